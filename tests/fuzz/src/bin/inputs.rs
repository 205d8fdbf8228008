//! Handles inputs of the fuzz targets, in an ordinary build: `inputs list`, `inputs replay TARGET FILE...`,
//! `inputs unpack TARGET FOLDER` (what is kept, seeds too), `inputs pack TARGET FOLDER` (replaces the archive).

use std::{env, fs, path::Path, process::ExitCode};

use anyhow::{Context, bail};
use dalgu_fuzz::{TARGETS, corpus, target};

fn main() -> anyhow::Result<ExitCode> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["list"] => TARGETS.iter().for_each(|target| println!("{}", target.name)),
        ["replay", name, files @ ..] if !files.is_empty() => {
            let target = target(name).with_context(|| format!("there is no target {name}"))?;
            for file in files {
                let input = fs::read(file).with_context(|| format!("cannot read {file}"))?;
                (target.run)(&input);
                println!("{name} takes {file}");
            }
        }
        ["unpack", name, folder] => {
            let seeds = corpus::seeds(name)?.into_iter().map(|(_, input)| input);
            for (number, input) in seeds.chain(corpus::found(name)?).enumerate() {
                fs::write(Path::new(folder).join(format!("{number:05}")), input)?;
            }
        }
        ["pack", name, folder] => {
            let mut inputs = corpus::read_folder(Path::new(folder))?;
            inputs.sort_by_key(|(_, input)| (input.len(), input.clone()));
            let archive = corpus::pack(inputs.iter().map(|(_, input)| input.as_slice()));
            let path = corpus::archive(name);
            fs::create_dir_all(path.parent().context("the archive has a folder")?)?;
            fs::write(&path, &archive)?;
            println!(
                "{}: {} inputs, {} bytes",
                path.display(),
                inputs.len(),
                archive.len()
            );
        }
        _ => bail!("usage: inputs list | replay TARGET FILE... | unpack TARGET FOLDER | pack TARGET FOLDER"),
    }
    Ok(ExitCode::SUCCESS)
}
