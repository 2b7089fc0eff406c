//! What operators do with intents.

use std::{sync::Arc, time::Duration};

use super::{Intent, IntentFence, IntentFilter, IntentState, IntentUpdate, Resource, UpstreamKey};
use crate::{Fenced, IdempotencyHandle, IntentCounts, RecoveryStore, StoreError, TRACING_TARGET};

/// What an operator has found out about an intent.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum IntentResolution {
    /// The upstream has made this resource: the next attempt gets it, without a call.
    Finalize(Resource),
    /// The upstream has refused for good, with this reason: the next attempt gets the refusal, without a call.
    Refuse(String),
    /// The upstream has not made the resource and will not: the next attempt calls again, with the same upstream key.
    Absent,
    /// Nothing yet: look it up again, at once and as often as one that was never looked up.
    LookAgain,
    /// What needed attention was attended to. For an intent that is finalized or dead.
    Acknowledge,
}

/// What became of an [`IntentResolution`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ResolveIntentOutcome {
    /// It is recorded.
    Resolved,
    /// The attempt that called last owns the record with a live lease, and may be calling. Nothing was changed.
    InProgress,
    /// The intent is finalized; or it was to be looked up again and is refused; or it was to be acknowledged and needs no
    /// attention. Nothing was changed.
    AlreadySettled,
    /// The intent was to be acknowledged and is open: settle it. Nothing was changed.
    StillOpen,
    /// There is no such intent.
    Absent,
}

impl IdempotencyHandle {
    /// Looks one intent up.
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    pub async fn get_intent(&self, intent: UpstreamKey) -> Result<Option<Intent>, StoreError> {
        self.recover(move |recovery| async move { recovery.get_intent(intent).await }).await
    }

    /// Lists intents, at most `limit`.
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    pub async fn list_intents(&self, filter: IntentFilter, limit: u32) -> Result<Vec<Intent>, StoreError> {
        self.recover(move |recovery| async move { recovery.list_intents(filter, limit).await }).await
    }

    /// Counts the intents that somebody has to look at.
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    pub async fn count_intents(&self) -> Result<IntentCounts, StoreError> {
        self.recover(move |recovery| async move { recovery.count_intents().await }).await
    }

    /// Settles an intent by hand, once you know what became of its call. Its record, if it was held for that alone, is
    /// claimable from then on: the client's retry runs the handler.
    ///
    /// Not while the attempt that called last owns the record with a live lease: it may be calling. What is finalized stays
    /// so.
    ///
    /// # Errors
    ///
    /// [`StoreError`]. After [`Ambiguous`](crate::StoreErrorKind::Ambiguous) it may be recorded;
    /// [`get_intent`](Self::get_intent) tells.
    pub async fn resolve_intent(
        &self,
        intent: UpstreamKey,
        resolution: IntentResolution,
    ) -> Result<ResolveIntentOutcome, StoreError> {
        self.recover(move |recovery| async move { resolve(&*recovery, intent, resolution).await }).await
    }

    /// Deletes settled intents and finished phases that are older than `retention` and whose record is gone, and kept
    /// requests that are not needed any more; of each at most `limit`. Returns how many. The [`Reaper`](crate::Reaper) does it
    /// by itself unless it is off.
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    pub async fn purge_settled(&self, retention: Duration, limit: u32) -> Result<u64, StoreError> {
        self.recover(move |recovery| async move { recovery.purge_settled(retention, limit).await }).await
    }

    async fn recover<T, F>(&self, work: impl FnOnce(Arc<dyn RecoveryStore>) -> F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, StoreError>> + Send + 'static,
    {
        let recovery = self.shared().recovery()?;
        self.shared().run_to_end(work(recovery)).await
    }
}

async fn resolve(
    recovery: &dyn RecoveryStore,
    intent: UpstreamKey,
    resolution: IntentResolution,
) -> Result<ResolveIntentOutcome, StoreError> {
    let acknowledged = resolution == IntentResolution::Acknowledge;
    let (fence, update) = match resolution {
        IntentResolution::Finalize(resource) => (IntentFence::Operator, IntentUpdate::Finalize(resource)),
        IntentResolution::Refuse(reason) => (IntentFence::Operator, IntentUpdate::Refuse(reason)),
        IntentResolution::Absent => (IntentFence::Operator, IntentUpdate::Absent(None)),
        IntentResolution::LookAgain => {
            (IntentFence::Operator, IntentUpdate::LookAgain { after: Duration::ZERO, absences: 0 })
        }
        IntentResolution::Acknowledge => (IntentFence::Attention, IntentUpdate::Close),
    };
    if recovery.update_intent(intent, fence, &update, None).await? == Fenced::Applied {
        tracing::info!(target: TRACING_TARGET, upstream_key = %intent, ?update, "an operator has resolved an intent");
        return Ok(ResolveIntentOutcome::Resolved);
    }
    let found = recovery.get_intent(intent).await?;
    Ok(match found.map(|found| found.state) {
        None => ResolveIntentOutcome::Absent,
        Some(IntentState::Finalized(_) | IntentState::Dead { absent: false, .. }) => {
            ResolveIntentOutcome::AlreadySettled
        }
        Some(IntentState::Open { .. }) if acknowledged => ResolveIntentOutcome::StillOpen,
        Some(IntentState::Dead { .. }) if acknowledged => ResolveIntentOutcome::AlreadySettled,
        Some(IntentState::Open { .. } | IntentState::Dead { .. }) => ResolveIntentOutcome::InProgress,
    })
}
