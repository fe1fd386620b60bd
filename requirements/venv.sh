#!/bin/sh
# Make the virtual environment fit: requirements/venv.sh FOLDER PYTHON [keep]
#
# A Python that is too old ends this with one line. An environment of another Python version, or one that does not
# start, is made anew; with `keep`, one of any version that is new enough stays.
folder=$1 python=$2 keep=$3
new_enough='import sys; sys.exit(sys.version_info < (3, 11))'
version='import sys; print("%d.%d" % sys.version_info[:2])'
advice="opd_async needs Python 3.11 or newer: name one, as in make install PYTHON=python3.11"
there=$("$folder/bin/python" -c "$version" 2>/dev/null) || there=none
if [ -n "$keep" ] && "$folder/bin/python" -c "$new_enough" 2>/dev/null; then
  exit 0
fi
wanted=$("$python" -c "$version" 2>/dev/null) || { echo "$python does not start; $advice" >&2; exit 2; }
"$python" -c "$new_enough" || { echo "$python is Python $wanted; $advice" >&2; exit 2; }
if [ "$there" != "$wanted" ]; then
  if [ -d "$folder" ]; then
    echo "$folder is of another Python ($there, not $wanted): making it anew"
  fi
  rm -rf "$folder" && "$python" -m venv "$folder"
fi
