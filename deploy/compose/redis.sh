#!/bin/sh
# Entry point of the Redis in deploy/compose.yaml. It writes the configuration, whose password no other user may read. Nothing
# is kept on disk: proxies tell a Redis that has lost its data what is running (docs/operations.md).
set -eu
umask 077
folder=${TMPDIR:-/tmp}
. "$(dirname "$0")/password.sh"

read_password "${SECRETS:-/run/secrets}/redis_password"
cat >"$folder/redis.conf" <<END
port 6379
dir $folder
save ""
appendonly no
maxmemory 256mb
maxmemory-policy noeviction
requirepass $password
END
exec redis-server "$folder/redis.conf" "$@"
