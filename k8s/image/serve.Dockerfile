# Serving: Triton, and what its Python models import. The model repository is mounted at /models, never baked in.
# Versions come from docker-bake.hcl.
ARG NVIDIA_MONTH
FROM nvcr.io/nvidia/tritonserver:${NVIDIA_MONTH}-py3

ARG NUMPY
ARG TOKENIZERS
ARG OPENVINO
ARG ONNXRUNTIME
ARG PROMETHEUS_CLIENT
ARG PSUTIL
COPY pyproject.toml README.md LICENSE /src/
COPY clients/millibert /src/clients/millibert
COPY build/millibert_build /src/build/millibert_build
COPY ensemble/millibert_ensemble /src/ensemble/millibert_ensemble
# millibert itself is for `millibert serve` and `millibert preflight`; the models do not import it.
RUN pip install --no-cache-dir "numpy==${NUMPY}" "tokenizers==${TOKENIZERS}" "openvino==${OPENVINO}" \
        "onnxruntime==${ONNXRUNTIME}" "prometheus-client==${PROMETHEUS_CLIENT}" "psutil==${PSUTIL}" /src \
    && rm -rf /src

# The user that NVIDIA's image has for this.
USER triton-server
ENV HOME=/tmp
EXPOSE 8000 8001 8002
ENTRYPOINT ["millibert"]
CMD ["serve", "--repository", "/models", "--host", "0.0.0.0"]
