# What the scripts of this folder share; not to be run by itself.
#
#   OUT      folder for records               (results)
#   PYTHON   interpreter with the libraries   (python)
#   DEVICE   cuda, or cpu to try the scripts  (cuda)
#   SMALL    1: tiny models, few seconds each, to try the scripts; figures mean nothing
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${OUT:-results}
python=${PYTHON:-python}
device=${DEVICE:-cuda}
small=${SMALL:+--small --batch 2 --seconds 1}
mkdir -p "$out"

# Time a case; what fails is said, and the next one runs.
speed() {
    "$python" -m benchmarks.speed "$@" --device "$device" $small || echo "failed: $*" >&2
}

# The largest batch under $1 GiB, the other arguments as they are.
largest() {
    local gib=$1
    shift
    "$python" -m benchmarks.speed largest --gib "$gib" --device "$device" \
        ${SMALL:+--small-model --from 2 --resolution 0.5} "$@" || echo "failed: $*" >&2
}
