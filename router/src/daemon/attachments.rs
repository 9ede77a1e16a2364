//! This host's attachments as they were made, kept on disk so that a restart finds legs and namespaces again.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use weft_core::control::{Attached, Target, Which};
use weft_core::model::EndpointId;
use weft_core::store::{Batch, Stored, Table};

/// One attachment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Attachment {
    /// What the caller got.
    pub(crate) attached: Attached,
    /// The namespace as the caller named it.
    pub(crate) target: Target,
    /// The runtime's id of the container.
    pub(crate) container_id: Option<String>,
}

impl Attachment {
    fn is(&self, which: &Which) -> bool {
        match which {
            Which::Id(id) => self.attached.id == *id,
            Which::Target(target, ifname) => {
                self.target == *target && self.attached.ifname == *ifname
            }
            Which::Container(id, ifname) => {
                self.container_id.as_deref() == Some(id) && self.attached.ifname == *ifname
            }
            Which::AllContainersBut(scope, valid) => self.container_id.as_ref().is_some_and(|id| {
                id.starts_with(scope.as_str())
                    && !valid
                        .iter()
                        .any(|(known, ifname)| known == id && *ifname == self.attached.ifname)
            }),
        }
    }
}

/// All of them, by endpoint.
#[derive(Debug, Default)]
pub(crate) struct Attachments(BTreeMap<EndpointId, Attachment>);

impl Attachments {
    /// As they were kept.
    pub(crate) fn restore(stored: &Stored) -> Self {
        let rows = stored
            .rows(Table::Attachments)
            .filter_map(|(_, value)| serde_json::from_slice::<Attachment>(value).ok());
        Self(
            rows.map(|attachment| (attachment.attached.id, attachment))
                .collect(),
        )
    }

    /// Adds one; the batch keeps it.
    pub(crate) fn insert(&mut self, attachment: Attachment) -> Batch {
        let id = attachment.attached.id;
        let row = serde_json::to_vec(&attachment).expect("plain data always encodes");
        self.0.insert(id, attachment);
        Batch(vec![(Table::Attachments.key(&[&id.0]), Some(row))])
    }

    /// Forgets one; the batch keeps that.
    pub(crate) fn remove(&mut self, id: &EndpointId) -> Batch {
        self.0.remove(id);
        Batch(vec![(Table::Attachments.key(&[&id.0]), None)])
    }

    /// Those that are meant.
    pub(crate) fn find(&self, which: &Which) -> Vec<Attachment> {
        self.0
            .values()
            .filter(|attachment| attachment.is(which))
            .cloned()
            .collect()
    }

    /// All.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Attachment> {
        self.0.values()
    }
}
