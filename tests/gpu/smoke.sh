#!/usr/bin/env bash
# Checks distill on a machine with a GPU, in at most 8 minutes:
#
#     bash tests/gpu/smoke.sh [--part K/N] [--out FOLDER] [--small] [--device cpu] [NAME ...]
#
# The machine needs no network, but Python with torch and the packages of distill[train]. Those that it lacks can be
# brought as wheels in tests/gpu/wheels (python -m tests.gpu.collect makes this folder). Writes FOLDER/smoke.json and
# prints a table. The parts, and what each needs, are described in tests/gpu/smoke.py.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
if compgen -G "tests/gpu/wheels/*.whl" >/dev/null; then
  site=${TMPDIR:-/tmp}/distill-smoke-site
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" \
    tests/gpu/wheels/*.whl
  export PYTHONPATH="$site:${PYTHONPATH:-}"
fi
export PYTHONPATH="$PWD:${PYTHONPATH:-}"
exec "$python" -m tests.gpu.smoke "$@"
