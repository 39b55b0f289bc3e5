# What the scripts of this folder share; not to be run by itself.
#
#   OUT      folder for records               (results/gpu)
#   PYTHON   interpreter with the libraries   (python)
#   DEVICE   cuda, or cpu to try the scripts  (cuda)
#   SMALL    1: tiny images and batches, a second each, to try the scripts; figures mean nothing
#
# Each case has its process and its record; what has a record is not measured again, so that a script that
# ran out of time goes on where it was.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${OUT:-results/gpu}
python=${PYTHON:-python}
device=${DEVICE:-cuda}
small=${SMALL:+--image-size 32 --batch-size 2 --seconds 0.5}
mkdir -p "$out"

# `dptrain bench` with these arguments; what fails is said, and the next one runs.
bench() {
    "$python" -m dptrain bench "$@" --device "$device" --out "$out" $small || echo "failed: $*" >&2
}
