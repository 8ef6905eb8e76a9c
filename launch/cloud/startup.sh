#!/usr/bin/env bash
# Trains one job on a TPU VM. The VM runs this script at every boot, as root, so the training may be
# new, done, resumable or running. The script writes logs/, one file per boot, to $job, and at the
# end DONE or FAILED. A preempted VM writes neither.
set -euo pipefail

# @settings@

mkdir -p "$folder"
exec 9>"$folder/lock"
# Only the owner of the lock trains. Child processes close it (9>&-), so that none of them keeps it
# after this script is killed.
flock --nonblock 9 || exit 0
log=$folder/$(date --utc +%Y%m%dT%H%M%SZ).log
exec >>"$log" 2>&1
trap 'exit 143' TERM

upload_log() {
  gcloud storage cp --quiet "$log" "$job/logs/" >/dev/null 2>&1 || true
}

finish() { # MARKER REASON
  echo "$1: $2"
  upload_log
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

# Sends the log every minute until this script ends, even by SIGKILL. Starts first, because a VM
# without a log is how `watch` recognizes that the bucket is closed to it.
while sleep 60 && kill -0 $$ 2>/dev/null; do upload_log; done 9>&- &
trap 'kill $!; upload_log' EXIT

# An unreadable bucket does not mean that the job is unfinished: retry until it can be listed,
# without a limit, because the VM cannot delete itself and continues once it gets the role.
until listing=$(gcloud storage ls "$job/"); do sleep 10; done
if grep --quiet --line-regexp --fixed-strings -e "$job/DONE" -e "$job/FAILED" <<<"$listing"; then
  exit 0
fi

for pause in 10 60 300 end; do
  get_image && break
  [[ $pause != end ]] || finish FAILED "the container image is unavailable: see the log"
  sleep "$pause"
done

train() {
  # A container of an earlier run of this script may still exist: let it save.
  docker stop bn_keras >/dev/null 2>&1 || true
  docker rm --force bn_keras >/dev/null 2>&1 || true
  status=0
  # A preempted VM has 30 s, of which 25 are for the save and the rest for the log. Docker's default
  # is 10.
  docker run --rm --init --name bn_keras --privileged --network=host --shm-size=16G \
    --stop-timeout=25 "${image:-bn_keras}" train "${arguments[@]}" 9>&- || status=$?
}

# Statuses 2 (invalid request) and 3 (divergence) would recur. After status 75 the training resumes
# as often as necessary: the bucket does not answer, and could not store FAILED either. After any
# other error it resumes from its last checkpoint, twice at most. The pause outlasts a VM that is
# being preempted.
for pause in 60 60 end; do
  while train && [[ $status = 75 ]]; do sleep 60; done
  case $status in
    0) finish DONE "the training is done" ;;
    2 | 3) break ;;
  esac
  [[ $pause = end ]] || sleep "$pause"
done
reason=$(grep '^error: ' "$log" | tail -n 1 || true)
finish FAILED "the training ended with status $status${reason:+, $reason}"
