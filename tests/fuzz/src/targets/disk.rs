//! A start from a damaged disk.

use std::time::Duration;

use weft_core::model::Now;
use weft_core::node::Start;
use weft_core::store::Stored;

use super::Seen;
use super::frames::restarts;
use super::records::reseal;
use crate::pieces::{cut, join, marked};
use crate::scene::{Host, SCENE};

/// Each piece harms a row of host 1's disk: what, which, where, and octets.
pub(super) fn disk(data: &[u8]) -> Seen {
    let mut disk = SCENE.disk.clone();
    for piece in cut(data, 12) {
        if let [what, row, high, low, octets @ ..] = piece {
            let at = usize::from(u16::from_be_bytes([*high, *low]));
            harm(&mut disk, *what, usize::from(*row), at, octets);
        }
    }
    let mut host = Host::begin(1, Start::Resume, disk, Now::default());
    host.pass(Duration::from_secs(2));
    host.look();
    if host.failed {
        return Seen::Refused;
    }
    host.pass(Duration::from_secs(31));
    host.look();
    restarts(&host);
    Seen::Taken
}

fn harm(disk: &mut Stored, what: u8, row: usize, at: usize, octets: &[u8]) {
    let keys: Vec<Vec<u8>> = disk.0.keys().cloned().collect();
    let Some(key) = keys.get(row % keys.len().max(1)) else {
        return;
    };
    let mut value = disk.0.get(key).cloned().unwrap_or_default();
    match what % 7 {
        // Octets written over.
        0 => {
            let from = at % (value.len() + 1);
            let end = (from + octets.len()).min(value.len());
            value.splice(from..end, octets.iter().copied());
        }
        1 => value.truncate(at),
        2 => {
            disk.0.remove(key);
            return;
        }
        // A row that nobody wrote.
        3 => {
            let (new, rest) = octets.split_at(octets.len().min(at % 64));
            disk.0.insert(marked(1 + what / 7 % 8, new), rest.to_vec());
            return;
        }
        // One row's value under another's key.
        4 => {
            value = disk
                .0
                .get(&keys[at % keys.len()])
                .cloned()
                .unwrap_or_default()
        }
        // A record with another content, rightly signed by the other host.
        5 => {
            let from = at % (value.len() + 1);
            let end = (from + octets.len()).min(value.len());
            value.splice(from..end, octets.iter().copied());
            value = reseal(&value);
        }
        // Another key.
        _ => {
            disk.0.remove(key);
            let mut key = key.clone();
            let from = 1 + at % key.len();
            let end = (from + octets.len()).min(key.len());
            key.splice(from.min(end)..end, octets.iter().copied());
            disk.0.insert(key, value);
            return;
        }
    }
    disk.0.insert(key.clone(), value);
}

pub(super) fn disk_seeds() -> Vec<Vec<u8>> {
    let rows = SCENE.disk.0.len() as u8;
    let mut seeds = vec![Vec::new()];
    // Rows whose loss a node must live with: what others have too.
    let records = SCENE.disk.0.keys().position(|key| key[0] == 2).unwrap_or(0) as u8;
    seeds.push(join([[2, records, 0, 0]]));
    seeds.push(join([[1, records, 0, 40]]));
    seeds.push(join([[0, records, 0, 70, 1, 2, 3]]));
    seeds.push(join([[5, records, 0, 70, 1, 2, 3]]));
    seeds.push(join([[3, rows, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8, 9]]));
    seeds.push(join([[4, records, 0, 1], [6, records + 1, 0, 5]]));
    seeds
}
