# One container for training: docker build --build-arg EXTRA=cpu|gpu|tpu --tag bn_keras .
# Its arguments are a command of launch/ with that command's flags:
#   docker run --rm bn_keras launch.train --config=... --workdir=...
# A job of one shot has no HEALTHCHECK: nobody asks it anything, and its exit status is the answer.

ARG EXTRA=cpu
ARG PYTHON=3.12

# All packages, in an environment that the next stage takes over. Only setup.cfg and pyproject.toml
# change this layer: bn_keras is a stub in here, which is there to ask for them.
FROM python:${PYTHON}-slim AS packages
ARG EXTRA
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /opt/stub
COPY setup.cfg pyproject.toml ./
# The versions are those of setup.cfg.
# hadolint ignore=DL3013
RUN mkdir bn_keras \
    && echo '__version__ = "0"' > bn_keras/__init__.py \
    && touch README.md LICENSE \
    && pip install --no-cache-dir --disable-pip-version-check ".[${EXTRA}]" \
    && pip uninstall --yes bn_keras

# The commands run from a checkout, and so they do here.
FROM python:${PYTHON}-slim AS checkout
ARG EXTRA
COPY --from=packages /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /opt/bn_keras
COPY bn_keras bn_keras
COPY configs configs
COPY launch launch
# The TensorFlow that was asked for, and no other, is there and can be imported. That for TPUs would
# ask Google's metadata server for minutes where there is none.
RUN TPU_SKIP_MDS_QUERY=1 python -c "import sys; from importlib.metadata import version; import tensorflow, bn_keras; \
    wheels = {'cpu': 'tensorflow-cpu', 'gpu': 'tensorflow', 'tpu': 'tensorflow-tpu'}; \
    assert version(wheels[sys.argv[1]]) == tensorflow.__version__" "${EXTRA}"
# A home that any user may write to: `docker run --user` may name one that has none.
ENV HOME=/tmp
ENTRYPOINT ["python", "-m"]
CMD ["launch.train", "--help"]

FROM checkout AS cpu
USER 1000:1000

FROM checkout AS gpu
# What the container toolkit brings in of the host's driver.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000

# Root stays: nobody else may open a TPU's devices.
FROM checkout AS tpu

# hadolint ignore=DL3006
FROM ${EXTRA}
