#!/bin/sh
# try_trl.sh [specifier]     reads BIN; called by `make try-trl`, on an environment that may be spoilt
#
# Puts another TRL into the environment, by default the newest, and says what of trl-ext breaks: first the names that it takes
# from TRL, then the trainers. The exit code is that of the tests.
set -u
cd "$(dirname "$0")/.."
bin=${BIN:?}
specifier=${1:-trl}

tested=$("$bin/python" -c "from importlib.metadata import version; print(version('trl'))")
"$bin/python" -m pip --disable-pip-version-check --quiet install --upgrade --no-deps "$specifier" || exit
found=$("$bin/python" -c "from importlib.metadata import version; print(version('trl'))")
echo "==> trl $found; trl-ext was tested with $tested"

status=0
for tests in tests/test_trl_contract.py tests/trainers; do
    echo "==> $tests"
    "$bin/python" -m pytest --quiet --tb=line -p no:cacheprovider "$tests" || status=1
done
if [ "$status" -eq 0 ]; then
    echo "==> nothing broke with trl $found"
else
    echo "==> trl $found breaks what is listed above"
fi
exit "$status"
