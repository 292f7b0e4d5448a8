#!/bin/sh
# Builds the client against Debian's ngtcp2 and prints the path of the program.
#
#   interop/ngtcp2/build.sh
#
# Nothing is installed: the packages are unpacked into a cache outside the clone, in a directory named after their
# version and the client's source, and used from there.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/antiphon/tools
packages="libngtcp2-dev libngtcp2-9 libngtcp2-crypto-gnutls-dev libngtcp2-crypto-gnutls2
    libcjson-dev libcjson1 libgnutls28-dev libgnutls30"

needs() {
    command -v "$1" > /dev/null || { echo "$0: $1 is missing: $2" >&2; exit 1; }
}
needs apt-get "the client is built against the packages of Debian 12"
needs dpkg "the client is built against the packages of Debian 12"
needs cc "install gcc"

known() {
    apt-cache policy libngtcp2-dev 2> /dev/null | sed -n 's/^ *Candidate: //p' | grep -v none || true
}
# An image without package lists, as containers are.
[ -n "$(known)" ] || apt-get update -q >&2
version=$(known)
case $version in
0.12.*) ;;
*) echo "$0: the client is written for ngtcp2 0.12 of Debian 12, apt offers '$version'" >&2; exit 1 ;;
esac

source=$(cat "$here"/*.c "$here"/*.h "$here"/build.sh | sha256sum | cut -c 1-16)
target=$cache/ngtcp2-$version-$source
if [ ! -x "$target/client" ]; then
    mkdir -p "$cache"
    work=$(mktemp -d "$cache/ngtcp2.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    mkdir "$work/debs" "$work/root"
    # shellcheck disable=SC2086
    (cd "$work/debs" && apt-get download -q $packages) >&2
    for package in "$work"/debs/*.deb; do
        dpkg -x "$package" "$work/root"
    done
    libraries=$(dirname "$(find "$work/root" -name libngtcp2.so)")
    inside=${libraries#"$work/root"}
    cc -std=c11 -D_GNU_SOURCE -O2 -g -Wall -Wextra -Werror -I"$work/root/usr/include" -o "$work/client" "$here"/*.c \
        -L"$libraries" -Wl,-rpath,"\$ORIGIN/root$inside" -lngtcp2_crypto_gnutls -lngtcp2 -lcjson -l:libgnutls.so.30
    rm -r "$work/debs"
    # Whoever built it at the same time has the same.
    mv -T "$work" "$target" 2> /dev/null || [ -x "$target/client" ]
fi
echo "$target/client"
