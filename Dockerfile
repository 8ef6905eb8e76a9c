# Image for training. Choose one EXTRA:
#   docker build --build-arg EXTRA=cpu|gpu|tpu --tag bn_keras .
# A container's arguments are a command of bn-keras and its flags:
#   docker run --rm bn_keras train --config=... --workdir=...
# There is no HEALTHCHECK: a batch job reports its result by its exit status.

ARG EXTRA=cpu
ARG PYTHON=3.12

# Installs the dependencies into an environment that the next stage copies. Only a change of
# setup.cfg installs them again.
FROM python:${PYTHON}-slim AS packages
ARG EXTRA
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /opt/requirements
COPY setup.cfg ./
RUN python -c "import configparser, sys; setup = configparser.ConfigParser(); setup.read('setup.cfg'); \
    extras = setup['options.extras_require']; \
    print(setup['options']['install_requires'], *(extras[extra] for extra in sys.argv[1:]))" \
    "${EXTRA}" train > requirements.txt \
    && pip install --no-cache-dir --disable-pip-version-check --requirement requirements.txt

FROM python:${PYTHON}-slim AS installed
ARG EXTRA
COPY --from=packages /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /opt/bn_keras
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY bn_keras bn_keras
COPY configs configs
COPY launch launch
# Installs the package, then checks that the requested TensorFlow is installed and can be imported.
# Outside of Google Cloud, TensorFlow for TPU would query a metadata server for minutes.
RUN pip install --no-cache-dir --disable-pip-version-check --no-deps . \
    && TPU_SKIP_MDS_QUERY=1 python -P -c "import sys; from importlib.metadata import version; import tensorflow, bn_keras; \
    wheels = {'cpu': 'tensorflow-cpu', 'gpu': 'tensorflow', 'tpu': 'tensorflow-tpu'}; \
    assert version(wheels[sys.argv[1]]) == tensorflow.__version__" "${EXTRA}"
# A home folder that any user can write to: the user of `docker run --user` may have none.
ENV HOME=/tmp
ENTRYPOINT ["bn-keras"]

FROM installed AS cpu
USER 1000:1000

FROM installed AS gpu
# Features of the host's driver that the NVIDIA container toolkit mounts.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000

# Only root can open a TPU's devices.
FROM installed AS tpu

# hadolint ignore=DL3006
FROM ${EXTRA}
