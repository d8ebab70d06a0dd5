# The command line in an image that runs on other machines than the one it was built on:
#
#     docker build -t pocketquant .
#     docker run --rm --init -v "$PWD:/work" --user "$(id -u):$(id -g)" pocketquant quantize Qwen3.5-4B --out 4b.gguf
#
# Debian, for x86-64 and ARM64; `--build-arg BASE=...` takes another release that has Python 3.10 to 3.13 and apt.
ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS build
# Not pinned: Debian keeps only the newest of a release. cmake and ninja come with the build, from PyPI. python3-venv is
# for a BASE whose Python is Debian's own; the official image uses its own Python all the same.
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install --yes --no-install-recommends g++ python3-venv && \
    rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/pocketquant
# llama.cpp builds for the very processor at hand by default, and its file would end elsewhere with an illegal
# instruction. Without GGML_NATIVE it is for any x86-64 with AVX2, FMA, BMI2 and F16C (2013 and later), or any ARMv8.
ARG CMAKE_ARGS="-DGGML_NATIVE=OFF"
ARG LLAMA_CPP_PYTHON="llama-cpp-python>=0.3.36"
# A layer of its own: a change of pocketquant does not build it again.
RUN CMAKE_ARGS="${CMAKE_ARGS}" /opt/pocketquant/bin/pip install --no-cache-dir --no-binary llama-cpp-python "${LLAMA_CPP_PYTHON}"
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY pocketquant ./pocketquant
RUN /opt/pocketquant/bin/pip install --no-cache-dir '.[eval]' && \
    /opt/pocketquant/bin/pip uninstall --yes pip

FROM ${BASE}
# llama.cpp's threads; certificates for hubs.
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install --yes --no-install-recommends ca-certificates libgomp1 && \
    rm -rf /var/lib/apt/lists/* && \
    useradd --create-home --uid 1000 pocketquant && \
    install --directory --mode=1777 /cache /work
COPY --from=build /opt/pocketquant /opt/pocketquant
# Compiled kernels and the trial of llama.cpp's are kept in /cache: a volume there saves ten seconds of each start.
ENV PATH="/opt/pocketquant/bin:${PATH}" \
    XDG_CACHE_HOME=/cache
LABEL org.opencontainers.image.title="pocketquant" \
      org.opencontainers.image.description="Qwen3.5 checkpoints in, small GGUF files out, with the numbers of what quantization cost" \
      org.opencontainers.image.licenses="Apache-2.0"
# A number, so that a system that forbids root sees that it is none.
USER 1000
WORKDIR /work
ENTRYPOINT ["pocketquant"]
CMD ["--help"]
