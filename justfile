# Recipes for `just`; `just` alone lists them. CI runs .ci/run: the same checks in one file.

build := "target/release/refusal-patch"

_list:
    @just --list --unsorted

# All tests but the slow ones
test:
    cargo test

# The main job on every broken fixture, sidecars in every encoding, a model that thinks
slow:
    tests/llama_cpp/install.sh
    REFUSAL_PATCH_LLAMA_CPP=required cargo test --test slow -- \
        --ignored main_job:: sidecar:: thinking::

# Formatting, clippy, both without a warning
lint:
    cargo fmt --check
    cargo clippy --all-targets -- -D warnings

# Formats the code
fmt:
    cargo fmt

# Compares the main job of two builds; `before` may be a folder that `golden-save` wrote
golden before after=build *options:
    python3 fixtures/golden.py {{ before }} {{ after }} {{ options }}

# Keeps the main job's results of a build
golden-save before folder *options:
    python3 fixtures/golden.py {{ before }} --save {{ folder }} {{ options }}

# The documentation of the library, without a warning
docs:
    RUSTDOCFLAGS="-D warnings" cargo doc --no-deps

# The Python wheel, installed and tried (packaging/wheel.sh)
wheel:
    packaging/wheel.sh

# Speed of decoding and of products
bench:
    cargo bench --bench decode
    cargo bench --bench product

# Advisories, licences, duplicate versions (`cargo install --locked cargo-deny`)
deny:
    cargo deny check --hide-inclusion-graph

# Bill of materials, target/refusal-patch.cdx.json (`cargo install --locked cargo-cyclonedx`)
sbom:
    cargo cyclonedx --format json --spec-version 1.5 --override-filename refusal-patch.cdx
    mkdir -p target
    mv refusal-patch.cdx.json target/
