//! Reconciler and completer as background tasks, and the time for which they take their work.

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use super::{Completer, Reconciler};
use crate::{
    node::{Node, tasks::repeat},
    redact::TRACING_TARGET,
};

impl Reconciler {
    /// Runs passes until the node drains or is dropped.
    pub(crate) async fn run(self, node: Weak<Node>) {
        let Some(draining) = node.upgrade().map(|node| node.tasks.draining.clone()) else { return };
        let failures = AtomicU32::new(0);
        let (this, node, failures) = (&self, &node, &failures);
        let pass = || {
            // Held during a pass only: the task must not keep a dropped layer alive.
            let node = node.upgrade();
            async move {
                let failed = match this.pass(&*node?).await {
                    Ok(_) => 0,
                    Err(error) => {
                        let error = &error as &dyn std::error::Error;
                        tracing::warn!(
                            target: TRACING_TARGET, error,
                            "dangling intents could not be taken; trying again later"
                        );
                        MAX_DOUBLINGS.min(failures.load(Ordering::Relaxed) + 1)
                    }
                };
                failures.store(failed, Ordering::Relaxed);
                Some(this.interval().saturating_mul(1 << failed))
            }
        };
        repeat(draining, pass).await;
    }
}

impl Completer {
    /// Runs passes until the node drains. It keeps the node alive: the completer has the
    /// application, and the application has the layer.
    pub(crate) async fn run(self, node: Arc<Node>) {
        let (this, node) = (&self, &node);
        let pass = || async move {
            match this.pass(node).await {
                Ok(pass) if pass.taken > 0 => tracing::debug!(
                    target: TRACING_TARGET, ?pass,
                    "a pass over abandoned requests has ended"
                ),
                Ok(_) => {}
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(
                        target: TRACING_TARGET, error,
                        "abandoned requests could not be taken; trying again later"
                    );
                }
            }
            Some(this.interval())
        };
        repeat(node.tasks.draining.clone(), pass).await;
    }
}

/// The pause of a reconciler grows up to eight times its interval.
const MAX_DOUBLINGS: u32 = 3;

/// The time for which an intent or a request is taken. If its process dies, another one takes it
/// after that.
pub(super) const TERM: Duration = Duration::from_secs(45);

/// The time after which the term of work that still runs is extended.
pub(super) const EXTEND_AFTER: Duration = Duration::from_secs(15);
