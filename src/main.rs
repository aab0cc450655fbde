//! The command line; see `refusal-patch --help`.

mod cli;

fn main() -> std::process::ExitCode {
    cli::main()
}
