//! Stores behind which another one works.

use std::pin::Pin;

use tower_idempotency::StoreError;

/// What `async_trait` makes of the result of a call.
pub type Call<'f, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'f>>;

/// In an `impl Store` or an `impl RecoveryStore` of `async_trait`: the calls of these names pass on to the store in
/// this field.
macro_rules! forward {
    ($field:ident: $($call:ident)*) => {$(
        $crate::support::forward::forward_call! { $call $field }
    )*};
}
#[allow(unused_imports, reason = "few tests have a store of their own")]
pub(crate) use forward;

/// One call that [`forward`] passes on, by its name.
#[allow(unused_macros, reason = "as above")]
macro_rules! forward_call {
    (prepare $field:ident) => { $crate::support::forward::forward_signature! { $field
        prepare<>() -> Vec<String>
    } };
    (claim $field:ident) => { $crate::support::forward::forward_signature! { $field
        claim<'a>(claim: &'a tower_idempotency::store::Claim) -> tower_idempotency::store::ClaimOutcome
    } };
    (renew $field:ident) => { $crate::support::forward::forward_signature! { $field
        renew<'a>(renewals: &'a [tower_idempotency::store::Renewal])
            -> Vec<tower_idempotency::store::RenewOutcome>
    } };
    (complete $field:ident) => { $crate::support::forward::forward_signature! { $field
        complete<'a>(attempt: &'a tower_idempotency::store::Attempt, response: bytes::Bytes)
            -> tower_idempotency::store::CompleteOutcome
    } };
    (release $field:ident) => { $crate::support::forward::forward_signature! { $field
        release<'a>(attempt: &'a tower_idempotency::store::Attempt) -> tower_idempotency::store::Fenced
    } };
    (hold $field:ident) => { $crate::support::forward::forward_signature! { $field
        hold<'a>(attempt: &'a tower_idempotency::store::Attempt) -> tower_idempotency::store::Fenced
    } };
    (get $field:ident) => { $crate::support::forward::forward_signature! { $field
        get<'a, 'b>(consumer: &'a tower_idempotency::Consumer, key: &'b tower_idempotency::IdempotencyKey)
            -> Option<tower_idempotency::store::Record>
    } };
    (list $field:ident) => { $crate::support::forward::forward_signature! { $field
        list<>(filter: tower_idempotency::store::RecordFilter, limit: u32)
            -> Vec<tower_idempotency::store::Record>
    } };
    (evict $field:ident) => { $crate::support::forward::forward_signature! { $field
        evict<'a, 'b>(consumer: &'a tower_idempotency::Consumer, key: &'b tower_idempotency::IdempotencyKey)
            -> bool
    } };
    (resolve $field:ident) => { $crate::support::forward::forward_signature! { $field
        resolve<'a, 'b>(
            consumer: &'a tower_idempotency::Consumer,
            key: &'b tower_idempotency::IdempotencyKey,
            resolution: tower_idempotency::store::Resolution
        ) -> tower_idempotency::store::ResolveOutcome
    } };
    (purge $field:ident) => { $crate::support::forward::forward_signature! { $field
        purge<>(limit: u32) -> u64
    } };
    (close $field:ident) => {
        fn close<'s, 'f>(&'s self) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send + 'f>>
        where
            's: 'f,
            Self: 'f,
        {
            self.$field.close()
        }
    };
    (transaction $field:ident) => {
        fn transaction(
            &self,
            attempt: &tower_idempotency::store::Attempt,
            limits: &tower_idempotency::store::TransactionLimits,
            extensions: &mut http::Extensions,
        ) -> Option<std::sync::Arc<dyn tower_idempotency::store::StoreTransaction>> {
            self.$field.transaction(attempt, limits, extensions)
        }
    };
    (begin_single $field:ident) => { $crate::support::forward::forward_signature! { $field
        begin_single<'a, 'b>(
            claim: &'a tower_idempotency::store::Claim,
            limits: &'b tower_idempotency::store::TransactionLimits
        ) -> tower_idempotency::store::BeginOutcome
    } };
    (recovery $field:ident) => {
        fn recovery(&self) -> Option<std::sync::Arc<dyn tower_idempotency::store::RecoveryStore>> {
            self.$field.recovery()
        }
    };
    (update_intent $field:ident) => { $crate::support::forward::forward_signature! { $field
        update_intent<'a, 'b>(
            intent: tower_idempotency::UpstreamKey,
            fence: tower_idempotency::store::IntentFence,
            update: &'a tower_idempotency::store::IntentUpdate,
            attention: Option<&'b str>
        ) -> tower_idempotency::store::Fenced
    } };
    (take_dangling $field:ident) => { $crate::support::forward::forward_signature! { $field
        take_dangling<'a>(names: &'a [String], limit: u32, pause: std::time::Duration)
            -> Vec<tower_idempotency::Intent>
    } };
    (count_overlooked $field:ident) => { $crate::support::forward::forward_signature! { $field
        count_overlooked<'a>(names: &'a [String], overdue: std::time::Duration, limit: u32)
            -> Vec<tower_idempotency::store::Overlooked>
    } };
    (get_intent $field:ident) => { $crate::support::forward::forward_signature! { $field
        get_intent<>(intent: tower_idempotency::UpstreamKey) -> Option<tower_idempotency::Intent>
    } };
    (list_intents $field:ident) => { $crate::support::forward::forward_signature! { $field
        list_intents<>(filter: tower_idempotency::intent::IntentFilter, limit: u32)
            -> Vec<tower_idempotency::Intent>
    } };
    (count_intents $field:ident) => { $crate::support::forward::forward_signature! { $field
        count_intents<>() -> tower_idempotency::intent::IntentCounts
    } };
    (find_phase $field:ident) => { $crate::support::forward::forward_signature! { $field
        find_phase<'a, 'b>(
            attempt: &'a tower_idempotency::store::Attempt,
            record: tower_idempotency::store::RecordId,
            name: &'b str
        ) -> Option<bytes::Bytes>
    } };
    (keep_request $field:ident) => { $crate::support::forward::forward_signature! { $field
        keep_request<'a, 'b>(
            attempt: &'a tower_idempotency::store::Attempt,
            record: tower_idempotency::store::RecordId,
            request: &'b bytes::Bytes,
            after: std::time::Duration
        ) -> tower_idempotency::store::Fenced
    } };
    (retain_record $field:ident) => { $crate::support::forward::forward_signature! { $field
        retain_record<'a, 'b>(
            consumer: &'a tower_idempotency::Consumer,
            key: &'b tower_idempotency::IdempotencyKey,
            record: tower_idempotency::store::RecordId
        ) -> tower_idempotency::store::Fenced
    } };
    (take_abandoned $field:ident) => { $crate::support::forward::forward_signature! { $field
        take_abandoned<>(limit: u32, pause: std::time::Duration) -> Vec<tower_idempotency::store::KeptRequest>
    } };
    (update_request $field:ident) => { $crate::support::forward::forward_signature! { $field
        update_request<'a>(
            record: tower_idempotency::store::RecordId,
            tries: Option<u32>,
            update: &'a tower_idempotency::store::RequestUpdate
        ) -> tower_idempotency::store::Fenced
    } };
    (list_requests $field:ident) => { $crate::support::forward::forward_signature! { $field
        list_requests<>(limit: u32) -> Vec<tower_idempotency::store::KeptRequest>
    } };
    (purge_settled $field:ident) => { $crate::support::forward::forward_signature! { $field
        purge_settled<>(retention: std::time::Duration, limit: u32) -> u64
    } };
}
#[allow(unused_imports, reason = "as above")]
pub(crate) use forward_call;

#[allow(unused_macros, reason = "as above")]
macro_rules! forward_signature {
    ($field:ident $call:ident<$($life:lifetime),*>($($name:ident: $type:ty),*) -> $output:ty) => {
        fn $call<'s, $($life,)* 'f>(&'s self, $($name: $type),*) -> $crate::support::forward::Call<'f, $output>
        where
            's: 'f,
            $($life: 'f,)*
        {
            self.$field.$call($($name),*)
        }
    };
}
#[allow(unused_imports, reason = "as above")]
pub(crate) use forward_signature;
