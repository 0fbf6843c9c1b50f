#!/usr/bin/env bash
# Makes or updates the project's virtual environment; quick when nothing changed. Used by `make venv`.
#
#   scripts/make_venv.sh VENV [PYTHON] [EXTRAS]    EXTRAS: comma-separated, see setup.py
#   scripts/make_venv.sh --choose [PYTHON]         only print the interpreter a new VENV would use
#
# An existing environment is kept unless it is broken or PYTHON names another interpreter. A stamp
# an extra in VENV/.stamps, newer than setup.py, says that the extra is installed.
set -euo pipefail

supported="3.11 3.12 3.13"
candidates="python3.13 python3.12 python3.11 python3"

# Prints the base executable (not that of an active environment) of the first candidate that runs,
# is supported and can make environments. Each is executed: a version manager's shim may exist and
# fail all the same.
choose_python() {
  local wanted=$1 name path answer version base seen=""
  while read -r name; do
    while read -r path; do
      if ! answer=$("$path" -c 'import sys
print("%d.%d" % sys.version_info[:2], getattr(sys, "_base_executable", "") or sys.executable)' \
        </dev/null 2>/dev/null); then
        seen+="  $path: does not run"$'\n'
        continue
      fi
      version=${answer%% *} base=${answer#* }
      if [[ " $supported " != *" $version "* ]]; then
        seen+="  $path: is $version"$'\n'
      elif ! "$path" -c 'import ensurepip, venv' </dev/null 2>/dev/null; then
        seen+="  $path: $version lacks venv or pip (Debian, Ubuntu: apt install python$version-venv)"$'\n'
      else
        echo "$base"
        return
      fi
    done < <(type -aP "$name")
  done < <(if [[ -n $wanted ]]; then echo "$wanted"; else printf '%s\n' $candidates; fi)
  {
    echo "error: longctx_jax needs Python ${supported// / or }: looked for ${wanted:-$candidates}, found:"
    printf '%s' "${seen:-  nothing on PATH$'\n'}"
    echo "install one, or name it: make venv PYTHON=/path/to/python3.12"
  } >&2
  return 1
}

# Identifies the installation behind an interpreter or an environment.
installation() {
  "$1" -c 'import os, sys; print(os.path.realpath(sys.base_prefix), sys.version_info[:2])' </dev/null
}

# Whether the environment $1 works and, if an interpreter $2 was asked for, comes from it.
is_usable() {
  [[ -x $1/bin/python ]] && "$1/bin/python" -c 'import pip' </dev/null 2>/dev/null || return 1
  [[ -z $2 || $(installation "$1/bin/python") == "$(installation "$2")" ]]
}

make_venv() {
  local venv=$1 wanted=$2 python=""
  [[ -z $wanted ]] || python=$(choose_python "$wanted")
  ! is_usable "$venv" "$python" || return 0
  if [[ -d $venv && ! -e $venv/pyvenv.cfg && -n $(ls -A "$venv") ]]; then
    echo "error: VENV must be a virtual environment or a new folder: got $venv; name another" >&2
    return 1
  fi
  [[ -n $python ]] || python=$(choose_python "")
  echo "making $venv with $python"
  "$python" -m venv --clear "$venv"
  echo '*' >"$venv/.gitignore"
}

install() {
  local venv=$1 extra missing="" extras
  mkdir -p "$venv/.stamps"
  for extra in base ${2//,/ }; do
    [[ $venv/.stamps/$extra -nt setup.py ]] || missing+=" $extra"
  done
  [[ -n $missing ]] || return 0
  extras=$(tr ' ' '\n' <<<"$missing" | sed '/^base$/d; /^$/d' | paste -sd, -)
  echo "installing longctx_jax${extras:+[$extras]} into $venv (minutes the first time)"
  "$venv/bin/python" -m pip install --disable-pip-version-check --no-input \
    -e ".${extras:+[$extras]}" </dev/null | { grep -v '^Requirement already satisfied' || true; }
  for extra in $missing; do touch "$venv/.stamps/$extra"; done
}

if [[ ${1:-} == --choose ]]; then
  choose_python "${2:-}"
else
  cd "$(dirname "$0")/.."
  make_venv "${1:-.venv}" "${2:-}"
  install "${1:-.venv}" "${3:-}"
fi
