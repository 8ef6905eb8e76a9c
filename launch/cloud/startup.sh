#!/usr/bin/env bash
# Trains one job on a TPU VM. The VM runs this at every boot, as root; so it may find a training
# that is done, one to go on with, or one that is running. What it leaves in $job: logs/, a file for
# each boot, and at the end DONE or FAILED. A preempted VM leaves neither.
set -euo pipefail

# @settings@

mkdir -p "$folder"
exec 9>"$folder/lock"
# Whoever has the lock trains. Its children get it closed (9>&-), lest they keep it when it is killed.
flock --nonblock 9 || exit 0
log=$folder/$(date --utc +%Y%m%dT%H%M%SZ).log
exec >>"$log" 2>&1
trap 'exit 143' TERM

ship_log() {
  gcloud storage cp --quiet "$log" "$job/logs/" >/dev/null 2>&1 || true
}

finish() { # MARKER REASON
  echo "$1: $2"
  ship_log
  until echo "$2" | gcloud storage cp --quiet - "$job/$1"; do sleep 10; done
  exit 0
}

get_image() {
  if [[ -n $image ]]; then
    case $image in
      *-docker.pkg.dev/* | gcr.io/* | *.gcr.io/*)
        gcloud auth configure-docker "${image%%/*}" --quiet || return
        ;;
    esac
    docker pull "$image" 9>&-
  else
    mkdir -p "$folder/source" &&
      gcloud storage cat "$job/source.tar.gz" | tar -xzf - -C "$folder/source" &&
      docker build --build-arg EXTRA=tpu --tag bn_keras "$folder/source" 9>&-
  fi
}

# A bucket that can't be read yet is no sign of a job that has not ended.
until listing=$(gcloud storage ls "$job/"); do sleep 10; done
if grep --quiet --line-regexp --fixed-strings -e "$job/DONE" -e "$job/FAILED" <<<"$listing"; then
  exit 0
fi

# As long as this script lives, however it ends.
while sleep 60 && kill -0 $$ 2>/dev/null; do ship_log; done 9>&- &
trap 'kill $!; ship_log' EXIT

for pause in 10 60 300 end; do
  get_image && break
  [[ $pause != end ]] || finish FAILED "the container's image can't be had: see the log"
  sleep "$pause"
done

# Statuses 2 and 3 are launch.train's own: they would come again. With any other the training goes
# on from its last checkpoint, a few times; in a VM that is being taken away, the pause outlasts it.
for pause in 60 60 end; do
  # One that outlived an earlier run of this script.
  docker rm --force bn_keras >/dev/null 2>&1 || true
  status=0
  docker run --rm --init --name bn_keras --privileged --network=host --shm-size=16G \
    "${image:-bn_keras}" launch.train "${arguments[@]}" 9>&- || status=$?
  case $status in
    0) finish DONE "launch.train is done" ;;
    2 | 3) break ;;
  esac
  [[ $pause = end ]] || sleep "$pause"
done
reason=$(grep '^error: ' "$log" | tail -n 1 || true)
finish FAILED "launch.train ended with status $status${reason:+, $reason}"
