# The project and its environment; see docs/cluster.md.
#   docker build -t longctx_jax .                                    CPU
#   docker build -t longctx_jax:cuda --build-arg EXTRAS=cuda13 .     NVIDIA GPUs
ARG PYTHON_VERSION=3.12
FROM python:${PYTHON_VERSION}-slim

# Comma-separated extras of setup.py: cuda13, tpu, text, hf, slurm, wandb.
ARG EXTRAS=""

RUN apt-get update \
    && apt-get install --yes --no-install-recommends make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/longctx_jax
# What the environment depends on, first: a change of the code does not install it again.
COPY setup.py pyproject.toml README.md LICENSE Makefile ./
COPY scripts/make_venv.sh scripts/
COPY longctx_jax/__init__.py longctx_jax/
RUN make venv EXTRAS="${EXTRAS}"
COPY longctx_jax longctx_jax
COPY configs configs
COPY scripts scripts

RUN useradd --create-home trainer && mkdir /data /runs && chown trainer /data /runs
USER trainer
ENV PATH=/opt/longctx_jax/.venv/bin:$PATH \
    PYTHONPATH=/opt/longctx_jax \
    PYTHONUNBUFFERED=1 \
    LONGCTX_DATA_DIR=/data
VOLUME ["/data", "/runs"]

# Exec form: the trainer itself gets SIGTERM, saves and exits 0.
CMD ["python", "-m", "scripts.train", "--config=configs/quickstart.py", "--workdir=/runs/quickstart"]
