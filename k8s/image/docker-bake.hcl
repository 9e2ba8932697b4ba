# Both images, with every version in this one place:
#
#   docker buildx bake -f k8s/image/docker-bake.hcl          # from the root of the repository
#   REGISTRY=registry.example/ml/ docker buildx bake -f k8s/image/docker-bake.hcl --push
#
# TensorRT has no version here: it is the one inside the two images of the same month, and `millibert preflight`
# compares what a plan was built with to what is there.

variable "NVIDIA_MONTH" { default = "26.10" } # Triton 2.74
variable "NUMPY" { default = "1.26.4" }
variable "TOKENIZERS" { default = "0.23.3" }
variable "OPENVINO" { default = "2026.4.0" }
variable "ONNXRUNTIME" { default = "1.32.0" }
variable "PROMETHEUS_CLIENT" { default = "0.26.0" }
variable "PSUTIL" { default = "7.2.2" }
variable "ONNX" { default = "1.23.0" }
variable "POLYGRAPHY" { default = "0.53.6" }
variable "TAG" { default = "0.1.0" }
variable "REGISTRY" { default = "" }

group "default" { targets = ["serve", "engine"] }

target "serve" {
  context    = "."
  dockerfile = "k8s/image/serve.Dockerfile"
  tags       = ["${REGISTRY}millibert-serve:${TAG}"]
  args = {
    NVIDIA_MONTH = NVIDIA_MONTH
    NUMPY        = NUMPY
    TOKENIZERS   = TOKENIZERS
    OPENVINO     = OPENVINO
    ONNXRUNTIME  = ONNXRUNTIME
    PROMETHEUS_CLIENT = PROMETHEUS_CLIENT
    PSUTIL            = PSUTIL
  }
}

target "engine" {
  context    = "."
  dockerfile = "k8s/image/engine.Dockerfile"
  tags       = ["${REGISTRY}millibert-engine:${TAG}"]
  args = {
    NVIDIA_MONTH = NVIDIA_MONTH
    NUMPY        = NUMPY
    TOKENIZERS   = TOKENIZERS
    OPENVINO     = OPENVINO
    ONNXRUNTIME  = ONNXRUNTIME
    ONNX         = ONNX
    POLYGRAPHY   = POLYGRAPHY
  }
}
