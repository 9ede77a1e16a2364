//! The file on disk: one redb database, written by a thread of its own so that a slow disk blocks nobody.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use weft_core::store::{Batch, Stored};

const TABLE: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("weft");
/// Batches that may wait for the disk; the core is held up beyond that, which bounds memory.
const QUEUE: usize = 1024;
/// Batches put into one transaction when the disk falls behind: one sync for all of them.
const GROUP: usize = 256;

/// Handle to the writing thread.
pub(crate) struct Disk(Mutex<Writer>);

/// Both are gone once it is closed.
struct Writer {
    queue: Option<SyncSender<(u64, Batch)>>,
    thread: Option<JoinHandle<()>>,
}

impl Disk {
    /// Opens `path` (created 0600 when absent), reads all of it and starts the writer. `on_durable` is called with the
    /// id of each batch once it is on stable storage, in order, or with the error that stopped the writer.
    pub(crate) fn open(
        path: &Path,
        on_durable: impl Fn(Result<u64>) + Send + 'static,
    ) -> Result<(Self, Stored)> {
        let database =
            Database::create(path).with_context(|| format!("can't open {}", path.display()))?;
        let stored =
            read_all(&database).with_context(|| format!("can't read {}", path.display()))?;
        let (queue, batches) = sync_channel(QUEUE);
        let thread = std::thread::Builder::new()
            .name("weft-disk".to_owned())
            .spawn(move || write_batches(&database, &batches, on_durable))
            .context("can't start the disk thread")?;
        let writer = Writer {
            queue: Some(queue),
            thread: Some(thread),
        };
        Ok((Self(Mutex::new(writer)), stored))
    }

    /// Queues a batch.
    pub(crate) fn write(&self, id: u64, batch: Batch) {
        // Not under the lock: a slow disk must not hold up whoever else writes.
        let queue = self.lock().queue.clone();
        if let Some(queue) = queue {
            // A closed queue means that the writer failed and has said so already.
            let _ = queue.send((id, batch));
        }
    }

    /// Writes what is queued and closes the file: another process may open it. What is queued later goes nowhere.
    pub(crate) fn close(&self) {
        let thread = {
            let mut writer = self.lock();
            writer.queue = None;
            writer.thread.take()
        };
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Writer> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.close();
    }
}

fn read_all(database: &Database) -> Result<Stored> {
    let mut found = BTreeMap::new();
    let transaction = database.begin_read()?;
    match transaction.open_table(TABLE) {
        Ok(table) => {
            for row in table.iter()? {
                let (key, value) = row?;
                found.insert(key.value().to_vec(), value.value().to_vec());
            }
        }
        Err(redb::TableError::TableDoesNotExist(_)) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(Stored(found))
}

fn write_batches(
    database: &Database,
    batches: &Receiver<(u64, Batch)>,
    on_durable: impl Fn(Result<u64>),
) {
    while let Ok(first) = batches.recv() {
        let mut group = vec![first];
        group.extend(batches.try_iter().take(GROUP));
        match commit(database, &group) {
            Ok(()) => group.iter().for_each(|(id, _)| on_durable(Ok(*id))),
            Err(error) => return on_durable(Err(error)),
        }
    }
}

fn commit(database: &Database, group: &[(u64, Batch)]) -> Result<()> {
    let transaction = database.begin_write()?;
    {
        let mut table = transaction.open_table(TABLE)?;
        for (key, value) in group.iter().flat_map(|(_, batch)| batch.0.iter()) {
            match value {
                Some(value) => drop(table.insert(key.as_slice(), value.as_slice())?),
                None => drop(table.remove(key.as_slice())?),
            }
        }
    }
    transaction.commit().context("the disk refused a write")?;
    Ok(())
}
