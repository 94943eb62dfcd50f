# One image for every pod of a run: Ray's head and workers, the job's submitter, the MLflow server.
#
#   docker build -t registry.example/raysteer:0.1.0 .                                    torch with CUDA, several GB
#   docker build -t registry.example/raysteer:0.1.0-cpu --build-arg TORCH_BACKEND=cpu .  torch for CPUs only
#
# Versions are those of constraints.txt. TORCH_BACKEND is one of uv's: cpu, cu130 ...; left out, torch comes from PyPI,
# whose Linux wheels bring their own CUDA libraries: the node needs the NVIDIA driver and its device plugin, nothing else.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG TORCH_BACKEND=
ENV UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never VIRTUAL_ENV=/opt/venv
RUN python -m venv /opt/venv && pip install --no-cache-dir 'uv>=0.9,<1'
WORKDIR /build
# Dependencies only, so that a change of the code does not install them again.
COPY pyproject.toml constraints.txt ./
RUN backend=${TORCH_BACKEND:+--torch-backend=${TORCH_BACKEND}} \
 && uv pip compile -q pyproject.toml -c constraints.txt $backend -o pinned.txt \
 && uv pip install --no-cache -r pinned.txt $backend

FROM python:${PYTHON}-slim
# The number is repeated in the manifests: volumes are given to this group.
RUN groupadd --gid 10001 raysteer && useradd --uid 10001 --gid 10001 --create-home --shell /usr/sbin/nologin raysteer
# A login shell, which KubeRay can be told to use, starts with a PATH of its own.
RUN echo 'export PATH=/opt/venv/bin:$PATH' > /etc/profile.d/raysteer.sh
COPY --from=build /opt/venv /opt/venv
COPY . /app
# The code is used where it lies: Ray's workers inherit the path, and the manifests name files below /app.
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true
WORKDIR /app
USER 10001:10001
CMD ["python", "-m", "cluster", "--help"]
