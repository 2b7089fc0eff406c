//! Decisions of operators about intents.

use std::time::Duration;

use crate::{
    error::StoreError,
    redact::{KeyLogging, TRACING_TARGET},
    store::recovery::RecoveryStore,
    stored::{
        intent::{Intent, IntentFence, IntentState, IntentUpdate, Resource, UpstreamKey},
        record::Fenced,
    },
};

/// The decision of an operator about an intent.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum IntentResolution {
    /// The upstream has made this resource. The next attempt gets it, without a call.
    Finalize(Resource),
    /// The upstream has refused for good, with this reason. The next attempt gets the refusal,
    /// without a call.
    Refuse(String),
    /// The upstream has not made the resource and never will. The next attempt calls again with the
    /// same upstream key.
    Absent,
    /// Nothing is known yet. The intent is looked up again, immediately and as often as one that
    /// was never looked up.
    LookAgain,
    /// The operator has dealt with an intent that is finalized or dead, and it needs no attention
    /// any more.
    Acknowledge,
}

/// The outcome of an [`IntentResolution`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ResolveIntentOutcome {
    /// The decision is recorded.
    Resolved,
    /// The attempt that called last owns the record with a live lease, and may be calling. Nothing
    /// was changed.
    InProgress,
    /// The decision does not fit the state of the intent. Nothing was changed.
    ///
    /// The intent is finalized; or the upstream refused it, and it cannot be looked up again; or it
    /// was to be acknowledged and needs no attention.
    AlreadySettled,
    /// The intent was to be acknowledged and is open. Settle it instead. Nothing was changed.
    StillOpen,
    /// There is no such intent.
    Absent,
}

pub(super) async fn resolve_intent(
    recovery: &dyn RecoveryStore,
    intent: UpstreamKey,
    resolution: IntentResolution,
    keys: KeyLogging,
) -> Result<ResolveIntentOutcome, StoreError> {
    // For the log: neither its key nor its consumer ever changes.
    let Some(Intent { consumer, key, name, .. }) = recovery.get_intent(intent).await? else {
        return Ok(ResolveIntentOutcome::Absent);
    };
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
        tracing::info!(
            target: TRACING_TARGET, %consumer, key = %keys.shown(&key), intent = name, upstream_key = %intent,
            ?update,
            "an operator has resolved an intent"
        );
        return Ok(ResolveIntentOutcome::Resolved);
    }
    // The fence did not hold; the state of the intent says why.
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
