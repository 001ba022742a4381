# The package with its command line and TorchX, for every scheduler that starts containers:
#     docker build -t torchrec_deepfm .
#     docker build -t torchrec_deepfm:cuda --build-arg DEVICE=cuda .    (the wheels bring CUDA 13, the host its driver)
FROM python:3.11-slim-bookworm

ARG DEVICE=cpu
# An index of PyTorch's wheels, where neither PyTorch's own nor pip's configured one will do.
ARG TORCH_INDEX_URL=""
ENV PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /opt/torchrec_deepfm

# What changes rarely comes first: the dependencies, as constraints.txt pins them, are a layer of their own.
COPY .ci/setup.py .ci/setup.py
COPY pyproject.toml constraints.txt LICENSE README.md ./
RUN DEVICE=$DEVICE TORCH_INDEX_URL=$TORCH_INDEX_URL python .ci/setup.py --dependencies

COPY apps apps
COPY torchrec_deepfm torchrec_deepfm
RUN .venv/bin/pip install --no-deps --no-build-isolation . \
    && .venv/bin/torchrec-deepfm doctor

RUN useradd --create-home --uid 1000 deepfm
USER 1000
WORKDIR /home/deepfm
ENV PATH=/opt/torchrec_deepfm/.venv/bin:$PATH
CMD ["torchrec-deepfm", "--help"]
