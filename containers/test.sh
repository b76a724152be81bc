#!/usr/bin/env bash
# `make container-test`: builds the CPU image from scratch, then distils a mixture in it. No image registry is used:
# debootstrap makes the base image. Packages come from the sources that pip and apt use on this machine.
set -euo pipefail
cd "$(dirname "$0")/.."

NEEDED_GB=11  # at most 9.1 GB were measured: vfs copies whole file systems, for the image and for each container
SUITE=bookworm
SUITE_PYTHON=3.11
SHORT="stages.pairs.count=8192 stages.reflow.images=256000 stages.one_step.images=256000 stages.evaluate.samples=2048"
PYTHON=${PYTHON:-python3}
TMPDIR=${TMPDIR:-/tmp}

step() { printf '\n== %d s: %s\n' "$SECONDS" "$*"; }
refuse() { echo "container-test: $*" >&2; exit 1; }

free_gb=$(($(df --output=avail -B 1000000 "$TMPDIR" | tail -n 1) / 1000))
echo "needs $NEEDED_GB GB in $TMPDIR; $free_gb GB are free"
[ "$free_gb" -ge "$NEEDED_GB" ] || refuse "too little space: free some, or set TMPDIR to a folder elsewhere"
if ! command -v buildah >/dev/null || ! command -v debootstrap >/dev/null; then
  install="apt-get install -y --no-install-recommends buildah debootstrap"
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    refuse "buildah or debootstrap is missing. Run: sudo $install"
  fi
  apt-get update -q && $install
fi
[ "$(id -u)" = 0 ] || refuse "debootstrap needs root. Run: sudo make container-test"
"$PYTHON" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$SUITE_PYTHON')" ||
  refuse "the wheels must be for the base's Python. Run: make container-test PYTHON=/path/to/python$SUITE_PYTHON"

work=$(mktemp --directory --tmpdir distill-containers-XXXXXX)
trap 'rm -rf --one-file-system "$work"' EXIT
trap 'exit 130' INT TERM HUP
export TMPDIR=$work BUILDAH_ISOLATION=chroot
in_storage() { buildah --storage-driver vfs --root "$work/storage" --runroot "$work/run" "$@"; }
quietly() { "$@" >"$work/log" 2>&1 || { tail -n 40 "$work/log"; return 1; }; }

step "the wheels of requirements-cpu.lock, by this machine's pip"
quietly "$PYTHON" -m pip wheel --no-deps --requirement containers/requirements-cpu.lock --wheel-dir "$work/wheels" ||
  refuse "if torch's CPU wheel was not found, set PIP_EXTRA_INDEX_URL to its index or PIP_FIND_LINKS to its folder"
du --summarize --human-readable "$work/wheels" | cut -f 1

step "the base: Debian $SUITE, by debootstrap"
in_storage from --name base scratch
# The mirror that apt uses for this suite on this machine, if any; else the default of debootstrap.
mirror=$(apt-get indextargets --format '$(REPO_URI)' "Codename: $SUITE" "Identifier: Packages" | head -n 1)
quietly debootstrap --variant=minbase "$SUITE" "$(in_storage mount base)" ${mirror:+"$mirror"}
in_storage commit --quiet --rm base localhost/base

step "the image: containers/Dockerfile, VARIANT=cpu"
quietly in_storage build --ignorefile containers/Dockerfile.dockerignore --file containers/Dockerfile \
  --build-arg VARIANT=cpu --build-arg BASE=localhost/base --tag localhost/distill \
  --build-arg PIP_NO_INDEX=1 --build-arg PIP_FIND_LINKS=/mnt --volume "$work/wheels:/mnt:ro" .
grep --extended-regexp "STEP|^Successfully built|^No broken" "$work/log" | cut -c 1-120
in_storage images localhost/distill
rm -rf "$work/wheels"

container=$(in_storage from localhost/distill)
entry=$(in_storage inspect --type image --format '{{index .OCIv1.Config.Entrypoint 0}}' localhost/distill)
user=$(in_storage run "$container" -- id --user --name)
[ "$user" = distill ] || refuse "the image runs as $user, not as distill"

step "$entry doctor, as the user $user"
in_storage run "$container" -- "$entry" doctor 2>"$work/log" || true
missing=$({ in_storage run "$container" -- "$entry" doctor --json 2>"$work/log" || true; } | "$PYTHON" -c \
  'import json, sys; print(*[f["what"] for f in json.load(sys.stdin) if f["state"] == "missing"], sep="; ")')
if [ "$missing" = "torch, torchvision" ]; then
  step "torchvision does not load, as it is not from the index of torch: torchvision and lpips are removed, so lpips is not tested"
  in_storage run --user root "$container" -- pip uninstall --quiet --yes torchvision lpips
elif [ -n "$missing" ]; then
  refuse "distill doctor reports as missing: $missing"
fi

step "a run like a Slurm job's: with a user id that the image lacks, code from the store, and the store mounted at the same path"
store=$work/store
mkdir --parents "$store/code"
cp --recursive distill recipes slurm "$store/code"
sed --in-place 's/^__version__ = .*/__version__ = "copied"/' "$store/code/distill/__init__.py"
chown --recursive 4242:4242 "$store"
in_storage run --user 4242:4242 --env HOME=/tmp --env PYTHONPATH="$store/code" --volume "$store:$store" \
  "$container" -- python3 -P -m distill run mixture-2d $SHORT --procs 2 launch.zero_stage=2 --store "$store"
"$PYTHON" - "$store/mixture-2d" <<'END'
import json, pathlib, sys
run = pathlib.Path(sys.argv[1])
assert json.loads((run / "env.json").read_text())["distill"] == "copied", "the image's code ran, not the store's"
rows = json.loads((run / "stages/evaluate/results.json").read_text())["rows"]
distance = {(row["network"], row["steps"]): row["distance"] for row in rows}
student, teacher = distance["one_step", 1], distance["teacher", 1]
assert student < teacher / 4, f"SW2 at one step: student {student}, teacher {teacher}"
END

step "passed; deleting $work"
