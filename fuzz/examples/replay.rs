//! `replay TARGET FILE...`: gives files to a target, without a fuzzer. `replay --seeds DIRECTORY` writes every target's
//! seeds; `replay --list` names the targets.
#![forbid(unsafe_code)]

use std::{fs, path::Path, process::ExitCode};

use antiphon_fuzz::{TARGETS, Target};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match &arguments[..] {
        ["--list"] => TARGETS.iter().for_each(|target| println!("{:<14} {}", target.name, target.about)),
        ["--seeds", directory] => return written(Path::new(directory)),
        [name, files @ ..] if !files.is_empty() => {
            let Some(target) = Target::named(name) else {
                eprintln!("no target is called {name}: see --list");
                return ExitCode::FAILURE;
            };
            for file in files {
                match fs::read(file) {
                    Ok(bytes) => println!("{file}: understood: {}", (target.run)(&bytes)),
                    Err(error) => {
                        eprintln!("{file}: {error}");
                        return ExitCode::FAILURE;
                    }
                }
            }
        }
        _ => {
            eprintln!("usage: replay TARGET FILE... | --seeds DIRECTORY | --list");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn written(directory: &Path) -> ExitCode {
    for target in TARGETS {
        let directory = directory.join(target.name);
        let all = fs::create_dir_all(&directory).and_then(|()| {
            (target.seeds)()
                .iter()
                .enumerate()
                .try_for_each(|(n, seed)| fs::write(directory.join(format!("seed-{n}")), seed))
        });
        if let Err(error) = all {
            eprintln!("{}: {error}", directory.display());
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
