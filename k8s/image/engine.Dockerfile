# Engine building and verification: NVIDIA's TensorRT image of the same month as the serving image, without torch.
# Versions come from docker-bake.hcl.
ARG NVIDIA_MONTH
FROM nvcr.io/nvidia/tensorrt:${NVIDIA_MONTH}-py3

ARG NUMPY
ARG TOKENIZERS
ARG OPENVINO
ARG ONNXRUNTIME
ARG ONNX
ARG POLYGRAPHY
COPY pyproject.toml README.md LICENSE /src/
COPY clients/millibert /src/clients/millibert
COPY build/millibert_build /src/build/millibert_build
COPY ensemble/millibert_ensemble /src/ensemble/millibert_ensemble
RUN pip install --no-cache-dir "numpy==${NUMPY}" "onnx==${ONNX}" "polygraphy==${POLYGRAPHY}" \
        "tokenizers==${TOKENIZERS}" "openvino==${OPENVINO}" "onnxruntime==${ONNXRUNTIME}" /src \
    && rm -rf /src \
    && useradd --create-home --uid 1000 --non-unique engine

USER engine
ENTRYPOINT ["millibert"]
CMD ["engine", "--repository", "/models"]
