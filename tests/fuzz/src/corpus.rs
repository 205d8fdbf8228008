//! Inputs that are kept: small ones made by hand in `seeds/TARGET/`, and those that the fuzzer found, minimised, in one file a
//! target, `corpus/TARGET.bin`: each input with its length before it, four bytes, the highest first. Used by the replay test
//! and by the program `inputs`.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// Where a target's found inputs are.
pub fn archive(target: &str) -> PathBuf {
    folder("corpus").join(format!("{target}.bin"))
}

/// Inputs made by hand, with their file names.
pub fn seeds(target: &str) -> io::Result<Vec<(String, Vec<u8>)>> {
    read_folder(&folder("seeds").join(target))
}

/// Inputs that were found. None where there is no archive yet.
pub fn found(target: &str) -> io::Result<Vec<Vec<u8>>> {
    match fs::read(archive(target)) {
        Ok(bytes) => unpack(&bytes),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Every file of a folder, in the order of their names.
pub fn read_folder(path: &Path) -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        files.push((
            entry.file_name().to_string_lossy().into_owned(),
            fs::read(entry.path())?,
        ));
    }
    files.sort();
    Ok(files)
}

/// An archive of inputs.
pub fn pack<'a>(inputs: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut archive = Vec::new();
    for input in inputs {
        let length = u32::try_from(input.len()).expect("libFuzzer keeps inputs far below 4 GiB");
        archive.extend(length.to_be_bytes());
        archive.extend(input);
    }
    archive
}

/// The inputs of an archive.
pub fn unpack(mut archive: &[u8]) -> io::Result<Vec<Vec<u8>>> {
    let short = || io::Error::new(io::ErrorKind::UnexpectedEof, "the archive is cut short");
    let mut inputs = Vec::new();
    while !archive.is_empty() {
        let (length, rest) = archive.split_first_chunk::<4>().ok_or_else(short)?;
        let length = usize::try_from(u32::from_be_bytes(*length)).map_err(io::Error::other)?;
        let (input, rest) = rest.split_at_checked(length).ok_or_else(short)?;
        inputs.push(input.to_vec());
        archive = rest;
    }
    Ok(inputs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_is_unpacked_and_a_cut_archive_is_an_error() {
        let inputs: [&[u8]; 3] = [b"a", b"", b"\0\0\0\x01"];
        let archive = pack(inputs);
        assert_eq!(unpack(&archive).unwrap(), inputs);
        assert!(unpack(&archive[..archive.len() - 1]).is_err());
        assert!(unpack(&[]).unwrap().is_empty());
    }
}
