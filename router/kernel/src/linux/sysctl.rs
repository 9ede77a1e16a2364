//! `/proc/sys`: what it shows of the network is the reading thread's namespace's.

use std::fs;
use std::io;
use std::path::PathBuf;

fn path(name: &str) -> PathBuf {
    PathBuf::from("/proc/sys").join(name)
}

/// The value, without the newline; `None` if the kernel has no such switch (or its device is not there).
pub(crate) fn read(name: &str) -> io::Result<Option<String>> {
    match fs::read_to_string(path(name)) {
        Ok(value) => Ok(Some(value.trim_end().to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes a value; a switch that is not there is left out.
pub(crate) fn write(name: &str, value: &str) -> io::Result<()> {
    match fs::write(path(name), value) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Writes a value unless it stands there already; says whether it wrote.
pub(crate) fn ensure(name: &str, value: &str) -> io::Result<bool> {
    match read(name)? {
        None => Ok(false),
        Some(found) if found == value => Ok(false),
        Some(_) => write(name, value).map(|()| true),
    }
}

/// The devices that have switches under `net/<family>/conf`, `all` and `default` left out.
pub(crate) fn devices(family: &str) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    let entries = match fs::read_dir(path(&format!("net/{family}/conf"))) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(names),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name != "all" && name != "default" {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Has the kernel IPv6? With `ipv6.disable=1` on its command line the switches are missing.
pub fn ipv6_available() -> bool {
    path("net/ipv6/conf").exists()
}
