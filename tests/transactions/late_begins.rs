//! A middleware that looks at the attempt before a retry inside the layer, and a handler that begins its transaction
//! late.

use axum::{
    Router,
    extract::Request,
    http::{Extensions, StatusCode},
    middleware::{Next, from_fn},
    response::{IntoResponse, Response},
    routing::post,
};
use tower_idempotency::{Idempotency, RejectionCode, Tx, TxError};

use crate::{
    bank::{Bank, Db, End, Node, charge, unique, with_both_strategies},
    support::{rerun::RERUNS, served::Count},
};

with_both_strategies!(
    a_late_transaction_of_a_second_run_is_refused_after_a_middleware_has_extracted_the_transaction,
    a_late_transaction_of_a_second_run_is_refused_after_a_middleware_has_extracted_the_attempt,
);

async fn tenant<DB: Db>(mut tx: Tx<DB>, request: Request, next: Next) -> Response {
    DB::run(&mut tx, "UPDATE accounts SET balance = balance").await.unwrap();
    drop(tx);
    next.run(request).await
}

async fn key(idempotency: Idempotency, request: Request, next: Next) -> Response {
    assert!(!idempotency.key().as_str().is_empty());
    next.run(request).await
}

async fn write<DB: Db>(extensions: &Extensions, run: usize) -> Result<Response, TxError> {
    let mut tx = Tx::<DB>::begin(extensions).await?;
    charge(&mut tx).await;
    let status = if run == 1 { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::CREATED };
    Ok(if run == 1 { status.into_response() } else { unique(status) })
}

async fn writes_no_second_charge<DB: Db>(bank: &Bank<DB>, around: fn(Router) -> Router) {
    let mut doubled = Vec::new();
    for (what, inside) in &RERUNS[..5] {
        for kept in [false, true] {
            let (runs, before) = (Count::default(), bank.charges().await);
            let counter = runs.clone();
            let of_request = move |request: Request| {
                let run = counter.add();
                async move { write::<DB>(request.extensions(), run).await }
            };
            let counter = runs.clone();
            let of_extensions = move |extensions: Extensions| {
                let run = counter.add();
                async move { write::<DB>(&extensions, run).await }
            };
            let route = if kept { post(of_extensions) } else { post(of_request) };
            let node = Node::new(bank.layer(), around(inside(Router::new().route("/charges", route))), runs);
            let key = uuid::Uuid::new_v4().to_string();
            let answer = node.send(&key).await;
            let charges = bank.charges().await - before;
            if charges != 0 || answer.rejection != Some(RejectionCode::TransactionInUse) {
                doubled.push((*what, kept, answer.status, charges));
            } else {
                node.until(&key, End::Released).await;
            }
        }
    }
    assert!(doubled.is_empty(), "{doubled:?}");
}

async fn a_late_transaction_of_a_second_run_is_refused_after_a_middleware_has_extracted_the_transaction<
    DB: Db,
>(
    bank: Bank<DB>,
) {
    writes_no_second_charge(&bank, |router| router.layer(from_fn(tenant::<DB>))).await;
}

async fn a_late_transaction_of_a_second_run_is_refused_after_a_middleware_has_extracted_the_attempt<
    DB: Db,
>(
    bank: Bank<DB>,
) {
    writes_no_second_charge(&bank, |router| router.layer(from_fn(key))).await;
}
