# Install fewstep into a virtual environment, for `make`: sh tools/set_up.sh PYTHON FOLDER REQUIREMENT
# What an interrupted call left is completed; what cannot be done is said in a sentence.
set -eu
python=$1 folder=$2 requirement=$3

fail() {
    echo "fewstep: $1" >&2
    exit 1
}

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))'
}

if ! "$folder/bin/python" -m pip --version >/dev/null 2>&1; then
    "$python" -c '' >/dev/null 2>&1 ||
        fail "PYTHON must be a Python that runs, got $python. Try: install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3 ..."
    new_enough "$python" ||
        fail "PYTHON must be Python 3.10 or newer, got $python ($("$python" --version 2>&1)). Try: name a newer one: make PYTHON=python3.12 ..."
    "$python" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
        fail "PYTHON must have its modules venv and ensurepip, $python has not. Try: apt-get install python3-venv (Debian, Ubuntu), or name another Python: make PYTHON=/path/to/python3 ..."
    echo "Setting up $folder with $("$python" --version 2>&1)"
    { "$python" -m venv "$folder" && "$folder/bin/python" -m pip --version >/dev/null; } ||
        fail "$folder cannot be set up (the lines above say why). Try: make clean, then the same command"
fi
new_enough "$folder/bin/python" ||
    fail "$folder must hold Python 3.10 or newer, got $("$folder/bin/python" --version). Try: make clean, then make PYTHON=python3.12 ..."
"$folder/bin/python" -m pip install --quiet --constraint constraints.txt --editable "$requirement" ||
    fail "the packages are not all installed (the lines above say why). Try: the same command again, which keeps what is there"
