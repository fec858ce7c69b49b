# What .ci/run, .ci/check and .ci/build-site share: stages with their times, and a look at what a step changed.
started=$SECONDS; stage_started=$SECONDS; stage_name=""

stage() {  # stage NAME: say how long the last stage took, and that the next begins
    [ -z "$stage_name" ] || printf '%s\n' "--- $stage_name: $((SECONDS - stage_started)) s"
    stage_name=${1:-}; stage_started=$SECONDS
    [ -z "$stage_name" ] || printf '\n=== %s\n' "$stage_name"
}

unchanged() {  # unchanged REMEDY: fail when what is written here differs from the commit
    local changes; changes=$(git status --porcelain -- nbs ftbook README.md)
    [ -n "$changes" ] || return 0
    echo "$changes"; git --no-pager diff -- nbs ftbook README.md | head -100
    echo "These files changed: $1"; exit 1
}
