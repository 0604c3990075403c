#!/usr/bin/env bash
# The commands that Compose lacks for the compose file (docs/deployment.md):
#
#   deployment.sh settings DOCUMENTS   makes deployment/: settings with new secrets, folders for keys and data
#   deployment.sh backup               database, settings and data into deployment/backups/TIME/
#   deployment.sh restore FOLDER       restores a backup
#   deployment.sh upgrade              builds the image of the checked-out version, backs up, restarts
set -euo pipefail
cd "$(dirname "$0")/../.."
umask 077
settings=deployment/settings.env
usage() { sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//'; }
say() { printf '%s\n' "$*" >&2; }
stop() { say "deployment.sh: $*"; exit 2; }

secret() { head -c 32 /dev/urandom | base64 | tr -d '\n' | tr '+/' '-_'; }
# for the password inside a database's address
letters() { secret | tr -d '=_-'; }

make_settings() {
  [ -d "$1" ] || stop "there is no folder $1. Say where your documents are."
  [ ! -e "$settings" ] || stop "$settings is there already. Edit it; its secrets open the database and the connections."
  local documents uid
  documents=$(cd "$1" && pwd)
  uid=$(id -u)
  mkdir -p deployment/data deployment/ssh deployment/backups
  # containers do not run as root: then a user of Airflow's image owns their files
  if [ "$uid" = 0 ]; then
    uid=50000
    chown "$uid" deployment/data deployment/ssh
  fi
  cat > "$settings.partial" <<EOF
# Made by include/scripts/deployment.sh. Keep it secret; docs/deployment.md explains each line.
DOCUMENTS=$documents
AIRFLOW_UID=$uid
ADMIN_USER=admin
ADMIN_PASSWORD=$(letters)
POSTGRES_PASSWORD=$(letters)
BROKER_PASSWORD=$(letters)
FERNET_KEY=$(secret)
JWT_SECRET=$(secret)
EOF
  mv "$settings.partial" "$settings"
  say "$settings is written: the UI's user is admin, with its ADMIN_PASSWORD."
  say "Put the GPU host's key and known_hosts into deployment/ssh, readable by user $uid alone."
  say "Then: docker compose up -d --build"
}

# Workers are started and stopped with the rest if the settings name them.
with_workers() { if grep -q '^EXECUTOR=Celery' "$settings"; then export COMPOSE_PROFILES=celery; fi; }

# As the user that owns deployment/data, without the image's entrypoint, which might print into a file.
in_container() { docker compose run -T --no-deps --entrypoint bash --rm scheduler -c "$1"; }

backup() {
  [ -f "$settings" ] || stop "there is no $settings: nothing is deployed here."
  with_workers
  # first, as a backup needs the database
  docker compose exec -T postgres pg_isready -q -h localhost -U airflow || stop "Postgres does not answer. docker compose up -d first."
  mkdir -p deployment/backups
  local folder
  folder=deployment/backups/$(date -u +%Y-%m-%dT%H-%M-%SZ)
  # not local: the trap below outlives this function
  work=$(mktemp -d deployment/backups/.partial.XXXXXX)
  trap 'rm -rf "$work"' EXIT
  cp "$settings" "$work/settings.env"
  docker compose exec -T postgres pg_dump -U airflow --format custom airflow > "$work/database.dump"
  # Without files that can be made again from documents. Files are written atomically; status 1 means that one vanished meanwhile.
  in_container 'tar -C /data --exclude=./scores --exclude=./selections --exclude=./tokens \
    --exclude=./corpora --exclude="*.partial" -cf - . || [ $? = 1 ]' > "$work/data.tar"
  sync
  mv "$work" "$folder"
  trap - EXIT
  say "$folder: $(du -sh "$folder" | cut -f1). It holds every secret but the keys of deployment/ssh."
}

restore() {
  local from=$1 file
  for file in database.dump data.tar settings.env; do
    [ -f "$from/$file" ] || stop "$from is no backup: there is no $file in it."
  done
  mkdir -p deployment/data deployment/ssh deployment/backups
  # on a new machine, prepare the folders for keys and data as settings does
  local uid
  uid=$(sed -n 's/^AIRFLOW_UID=//p' "$from/settings.env")
  [ "$(id -u)" != 0 ] || chown "$uid" deployment/data deployment/ssh
  cp "$from/settings.env" "$settings.partial"
  mv "$settings.partial" "$settings"
  with_workers
  docker compose build
  docker compose down
  docker compose up -d --wait postgres
  # the password in the database may be that of other settings
  docker compose exec -T postgres sh -c 'dropdb -U airflow --if-exists airflow && createdb -U airflow airflow &&
    echo "ALTER ROLE airflow PASSWORD '"'"'$POSTGRES_PASSWORD'"'"'" | psql -q -U airflow airflow'
  docker compose exec -T postgres pg_restore -U airflow --dbname airflow --exit-on-error < "$from/database.dump"
  in_container 'tar -C /data -xf -' < "$from/data.tar"
  docker compose up -d
  say "Restored from $from. What was made since lies beside it in deployment/data."
}

upgrade() {
  [ -f "$settings" ] || stop "there is no $settings: nothing is deployed here."
  with_workers
  # the containers keep running until image and backup are ready
  docker compose build
  backup
  docker compose down
  docker compose up -d
  say "Upgraded. Jobs on the GPU host went on; the tasks that watch them find them again."
}

case "${1:-} $#" in
  "settings 2") make_settings "$2" ;;
  "backup 1") backup ;;
  "restore 2") restore "$2" ;;
  "upgrade 1") upgrade ;;
  "-h 1" | "--help 1") usage ;;
  *) usage >&2; exit 2 ;;
esac
