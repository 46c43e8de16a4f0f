# shellcheck shell=bash
# Running a command so that signals reach it, its status comes back, and nothing of it is left behind.

forward() { # SIGNAL
  signal=$1
  if [[ -n $child ]]; then kill -s "$signal" "$child" 2>/dev/null || true; fi
}

gone() { # PROCESS SECONDS: whether it (or, as -GROUP, all of a process group) ends within that time
  local tries=$(($2 * 10))
  while kill -s 0 -- "$1" 2>/dev/null; do
    ((tries-- > 0)) || return 1
    sleep 0.1
  done
}

# Runs COMMAND and leaves its exit status in `status`. SIGINT, SIGTERM and SIGUSR1 go on to it (a closed
# terminal as SIGTERM), and it is waited for however long it takes to save.
supervise() { # COMMAND ...
  local again
  signal='' child='' status=0
  trap 'forward INT' INT
  trap 'forward USR1' USR1
  trap 'forward TERM' TERM HUP QUIT

  # Job control gives the command a process group of its own and an undisturbed SIGINT: Ctrl-C reaches it
  # once, through `forward`. It is off again for `wait`, which would else return when the command is stopped.
  set -m
  "$@" </dev/null &
  child=$!
  set +m
  if [[ -n $signal ]]; then forward "$signal"; fi

  # A signal makes `wait` return early, with a status that is not the command's: then wait once more.
  while :; do
    signal='' again=0
    wait "$child" 2>/dev/null || again=$? # quiet, as bash has its own words for a killed command
    ((again == 127 && status > 128)) || status=$again
    if [[ -z $signal ]] || ((again < 128)); then break; fi
  done
  trap - INT USR1 TERM HUP QUIT

  # Workers that outlived the command would keep the cards and the log's pipe.
  if ! gone "-$child" 1; then
    kill -s TERM -- "-$child" 2>/dev/null || true
    gone "-$child" 5 || kill -s KILL -- "-$child" 2>/dev/null || true
  fi
}
