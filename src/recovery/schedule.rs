//! Reconciler and completer as background tasks.

use std::sync::{Arc, Weak};

use super::{Completer, Reconciler};
use crate::{
    node::{Node, tasks::repeat},
    redact::TRACING_TARGET,
};

impl Reconciler {
    /// Runs passes until the node drains or is dropped.
    pub(crate) async fn run(self, node: Weak<Node>) {
        let Some(draining) = node.upgrade().map(|node| node.tasks.draining.clone()) else { return };
        let (this, node) = (&self, &node);
        let pass = || {
            // Held during a pass only: the task must not keep a dropped layer alive.
            let node = node.upgrade();
            async move { Some(this.pass(&*node?).await.map(drop)) }
        };
        repeat(draining, self.interval(), "dangling intents could not be taken", pass).await;
    }
}

impl Completer {
    /// Runs passes until the node drains. It keeps the node alive: the completer has the
    /// application, and the application has the layer.
    pub(crate) async fn run(self, node: Arc<Node>) {
        let (this, node) = (&self, &node);
        let pass = || async move {
            Some(this.pass(node).await.map(|pass| {
                if pass.taken > 0 {
                    tracing::debug!(
                        target: TRACING_TARGET, ?pass,
                        "a pass over abandoned requests has ended"
                    );
                }
            }))
        };
        repeat(node.tasks.draining.clone(), self.interval(), "abandoned requests could not be taken", pass)
            .await;
    }
}
