#!/usr/bin/env bash
# Brings node-llama-cpp and its prebuilt llama.cpp into node_modules here. Nothing is compiled; seconds; safe to repeat.
set -euo pipefail
cd "$(dirname "$0")"

wanted() {
    cmp -s package.json node_modules/.installed.json
}

if ! wanted; then
    # Optional dependencies are the builds for other machines and graphics cards (hundreds of megabytes);
    # the one wanted is a plain dependency of package.json. Scripts would only look for a compiler.
    npm install --omit=optional --ignore-scripts --no-audit --no-fund --no-package-lock --loglevel=error
    # npm counts a package that is optional somewhere as optional: ask for the build by name if it was left out.
    if [ ! -d node_modules/@node-llama-cpp/linux-x64 ]; then
        version=$(node -p 'require("./package.json").dependencies["@node-llama-cpp/linux-x64"]')
        npm install --omit=optional --ignore-scripts --no-audit --no-fund --no-package-lock --no-save --loglevel=error "@node-llama-cpp/linux-x64@$version"
    fi
    ls node_modules/@node-llama-cpp/linux-x64/bins/linux-x64/llama-addon.node node_modules/node-llama-cpp/package.json >/dev/null
    cp package.json node_modules/.installed.json
fi
