//! The state directory: who this node is, kept so that nobody else can read it or start from a copy of it.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{Flock, FlockArg};
use weft_core::crypto::{self, Random, Secret};
use weft_core::identity::Identity;
use weft_core::model::NodeId;

/// How long a predecessor that is going down may keep what this daemon needs.
pub(crate) const PREDECESSOR: Duration = Duration::from_secs(2);

/// The opened and locked state directory.
pub(crate) struct StateDir {
    path: PathBuf,
    /// Held as long as the daemon lives: two daemons on one state would be two nodes with one key.
    _lock: Flock<File>,
}

impl StateDir {
    /// Opens or makes the directory, checks its owner and mode, and takes its lock.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        if !path.exists() {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(path)
                .with_context(|| format!("can't make the state directory {}", path.display()))?;
        }
        check_private(path, 0o700)?;
        let lock = private_file(&path.join("lock"))?;
        let lock = lock_patiently(lock, path)?;
        Ok(Self {
            path: path.to_owned(),
            _lock: lock,
        })
    }

    /// The database's path.
    pub(crate) fn database(&self) -> PathBuf {
        self.path.join("weft.redb")
    }

    /// The id of the identity kept here.
    pub(crate) fn identity_id(&self) -> Result<NodeId> {
        Ok(read_identity(&self.path.join("identity.key"))?.id())
    }

    /// Loads the identity, or makes one on the first start. Refuses a state that was copied from another machine
    /// unless `rebind` says that the machine changed on purpose.
    pub(crate) fn identity(&self, random: &mut Random, rebind: bool) -> Result<Identity> {
        let path = self.path.join("identity.key");
        let binding_path = self.path.join("machine");
        let identity = if path.exists() {
            read_identity(&path)?
        } else {
            let identity = Identity::generate(random);
            write_durable(&path, identity.to_bytes().expose())?;
            identity
        };
        let binding = machine_binding(&identity);
        match fs::read(&binding_path) {
            Ok(stored) if stored == binding || rebind => {}
            Ok(_) => bail!(
                "{} was made on another machine: a copy of a node's state can't run twice. If this machine replaces \
                 the old one for good, start it with `weft up --rebind`; else remove the directory to join as a new node",
                self.path.display()
            ),
            Err(_) => {}
        }
        write_durable(&binding_path, &binding)?;
        Ok(identity)
    }
}

/// A daemon that was just killed holds its lock for a moment more.
fn lock_patiently(mut file: File, path: &Path) -> Result<Flock<File>> {
    let begun = Instant::now();
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((back, _)) if begun.elapsed() < PREDECESSOR => file = back,
            Err(_) => bail!(
                "another weft daemon uses {}: see `weft status`, or give this one its own --state-dir and --run-dir",
                path.display()
            ),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn read_identity(path: &Path) -> Result<Identity> {
    check_private(path, 0o600)?;
    let mut bytes = Vec::new();
    File::open(path)?.read_to_end(&mut bytes)?;
    let key: [u8; 64] = bytes
        .as_slice()
        .try_into()
        .map_err(|_| anyhow::anyhow!("{} is damaged: {} octets", path.display(), bytes.len()))?;
    Ok(Identity::from_bytes(&Secret::new(key)))
}

/// Hash of what tells machines apart, keyed by the node's id so that it reveals nothing.
fn machine_binding(identity: &Identity) -> Vec<u8> {
    let mut facts = identity.id().0.to_vec();
    for path in ["/etc/machine-id", "/sys/class/dmi/id/product_uuid"] {
        facts.extend(fs::read(path).unwrap_or_default());
        facts.push(0);
    }
    crypto::sha256(&facts).to_vec()
}

fn check_private(path: &Path, wanted: u32) -> Result<()> {
    let meta = fs::metadata(path).with_context(|| format!("can't read {}", path.display()))?;
    ensure!(
        meta.uid() == nix::unistd::geteuid().as_raw(),
        "{} belongs to user {}: weft keeps keys only where nobody else can change them",
        path.display(),
        meta.uid()
    );
    ensure!(
        meta.mode() & 0o077 == 0,
        "{} can be read by others (mode {:o}): run `chmod {wanted:o} {0}`",
        path.display(),
        meta.mode() & 0o777
    );
    Ok(())
}

fn private_file(path: &Path) -> Result<File> {
    OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("can't open {}", path.display()))
}

/// Writes a small file whole or not at all: a new file, synced, renamed over the old, the directory synced.
fn write_durable(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = path.with_extension("new");
    let mut file = OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(&temporary)
        .with_context(|| format!("can't write {}", temporary.display()))?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    if let Some(parent) = path.parent() {
        File::open(parent)?.sync_all()?;
    }
    Ok(())
}
