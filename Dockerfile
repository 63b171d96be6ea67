# medlit in a container, with the packages that `make install` installs:
#
#   docker build --tag medlit .                              # for a CPU
#   docker build --tag medlit:cuda --build-arg BUILD=gpu .   # for an NVIDIA GPU; PyTorch's wheels bring CUDA
#
# docs/deployment.md shows how to run it. Weights and notes are mounted, never part of the image.

FROM python:3.12-slim AS packages
ARG BUILD=cpu
WORKDIR /source
COPY requirements requirements
RUN python -m venv /opt/medlit \
    && grep -E '^torch(vision)?==' "requirements/$BUILD.txt" > torch.txt \
    && /opt/medlit/bin/pip install --no-cache-dir --constraint requirements/base.txt --requirement torch.txt \
    && /opt/medlit/bin/pip install --no-cache-dir --no-deps \
      --requirement "requirements/$BUILD.txt" --requirement requirements/serve.txt
COPY pyproject.toml LICENSE README.md ./
COPY src src
RUN /opt/medlit/bin/pip install --no-cache-dir --no-deps --no-build-isolation .

FROM python:3.12-slim
# PyTorch and Triton compile kernels with it. Debian keeps one version of a package, so a pinned one would vanish.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home medlit \
    && mkdir --parents /cache /medlit/logs /notes /weights \
    && chmod 1777 /cache /medlit/logs
COPY --from=packages /opt/medlit /opt/medlit
COPY configs /medlit/configs
# The caches of notes and of compiled kernels end with the container. Any user may run it, hence HOME.
ENV PATH=/opt/medlit/bin:$PATH \
    HOME=/cache \
    HF_HOME=/weights \
    HF_DATASETS_CACHE=/cache/datasets \
    MEDLIT_CACHE=/cache/medlit \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000
WORKDIR /medlit
ENTRYPOINT ["medlit"]
CMD ["--help"]
