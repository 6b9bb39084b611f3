# Build the wheel and use it where nothing else of fewstep is: sh tools/try_wheel.sh VENV [demo]
# The new environment borrows the dependencies of VENV (a path file, which does not activate VENV's editable fewstep), because
# installing torch again takes minutes. With `demo` it also runs the demo in its shortest form. No setting, no cache and no network reach the commands.
set -eu
venv=$(cd "$1" && pwd)
root=$(cd "$(dirname "$0")/.." && pwd)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT

"$venv/bin/python" -m pip wheel --quiet --no-deps --wheel-dir "$place/dist" "$root"
"$venv/bin/python" -m venv --without-pip "$place/env"
own=$("$place/env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$own/borrowed.pth"
"$venv/bin/python" -m pip --quiet --python "$place/env/bin/python" install --no-deps --no-index "$place"/dist/*.whl

mkdir "$place/home"
cd "$place/home"
bare() {
    env -i PATH="$place/env/bin:$PATH" HOME="$place/home" FEWSTEP_DATA="$place/no-data" \
        http_proxy=http://127.0.0.1:9 https_proxy=http://127.0.0.1:9 "$@"
}
bare python -c "import fewstep; assert fewstep.__file__.startswith('$place'), fewstep.__file__"
bare fewstep --version
bare fewstep recipes >recipes.txt
grep -q '^  own/sid' recipes.txt
bare fewstep schema >run.schema.json
bare fewstep sample fashion-mnist --evaluations 1 --seeds 0-3 --out samples.png
if [ "${2:-}" = demo ]; then
    bare fewstep demo --images 640 --samples 64 --processes 1
    test -s runs/demo/report.html
fi
echo "the wheel works: $(basename "$place"/dist/*.whl)"
