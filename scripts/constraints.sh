#!/usr/bin/env bash
# Prints constraints.txt: what pip resolves in a fresh environment for everything that pyproject.toml names.
# Usage, from the project's root: scripts/constraints.sh > constraints.new && mv constraints.new constraints.txt   (or: make constraints)
# PYTHON names the interpreter; take the oldest supported one, as newer releases of a package may have left it behind.
set -euo pipefail

torch=2.13.0
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

"${PYTHON:-python3.11}" -m venv "$dir/venv"
echo "torch==$torch" > "$dir/torch.txt"
"$dir/venv/bin/pip" install --constraint "$dir/torch.txt" '.[all,bench,lint,test]' >&2

cat <<'HEADER'
# The exact releases that mtrl is tested with: everything that the extras of pyproject.toml install, for Python 3.11 and newer.
# Written by `make constraints`; not for editing by hand. torch's own companions (CUDA) are pinned by torch.
HEADER
# A local version ("+cpu") names one build of a release; which build is for each machine to choose.
"$dir/venv/bin/pip" freeze --all --exclude mtrl_cli --exclude pip | grep -viE '^(nvidia|cuda|triton)' | sed 's/+[A-Za-z0-9.]*$//' | LC_ALL=C sort -f
