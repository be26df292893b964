#!/bin/sh
# Entry point of the proxies in deploy/compose.yaml. It gives `autotts` the password of Redis in a URL, and that of PostgreSQL in
# a file of its own: clients of PostgreSQL ignore a password file that other users may read, and a mounted secret is such a file.
set -eu
umask 077
secrets=${SECRETS:-/run/secrets}
. "$(dirname "$0")/password.sh"

if [ -z "${AUTOTTS_UPSTREAM-unset}" ]; then
  echo "set UPSTREAM to the URL of vLLM" >&2
  exit 2
fi
read_password "$secrets/postgres_password"
echo "postgres:5432:autotts:autotts:$password" >"$PGPASSFILE"
read_password "$secrets/redis_password"
export AUTOTTS_LIMITS="redis://:$password@redis:6379/0"
exec autotts "$@"
