//! Prints the JSON Schema of the main job's record: `cargo run --example schema`.

fn main() {
    print!("{}", refusal_patch::report::json_schema());
}
