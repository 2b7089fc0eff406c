//! Results of phases are what a later attempt reads.

use std::collections::HashMap;

use axum::http::StatusCode;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tower_idempotency::{Idempotency, RejectionCode, Resource, TxError};

use crate::{
    phases::{Site, on_both_stores},
    support::{db::Db, served::Count},
};

on_both_stores!(
    a_result_that_cannot_be_read_again_is_refused_before_anything_is_committed,
    the_first_attempt_gets_what_a_later_one_gets,
    the_resource_of_a_call_is_the_same_in_every_attempt,
);

async fn refused<DB: Db, T>(site: &Site<DB>, what: &'static str, result: T)
where
    T: Serialize + DeserializeOwned + Clone + Send + Sync + 'static,
{
    let handler = move |idempotency: Idempotency| {
        let result = result.clone();
        async move {
            let step = async |tx: &mut DB::Connection| {
                DB::run(tx, &format!("INSERT INTO steps VALUES ('{what}')")).await?;
                Ok::<_, TxError>(result)
            };
            idempotency.phase("step", step).await.map(|_| StatusCode::CREATED)
        }
    };
    let node = site.node(handler);
    for _ in 0..2 {
        node.send_after_end().await.assert_refused(RejectionCode::IntentMisused);
        assert_eq!(site.steps(what).await, 0, "{what}");
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind")]
enum Tagged {
    Wide { cents: u128 },
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Renamed {
    #[serde(rename(serialize = "written", deserialize = "read"))]
    name: String,
}

async fn a_result_that_cannot_be_read_again_is_refused_before_anything_is_committed<DB: Db>(site: Site<DB>) {
    refused(&site, "nan", f64::NAN).await;
    refused(&site, "infinity", vec![1.0, f64::INFINITY]).await;
    refused(&site, "map", HashMap::from([((1, 2), 3)])).await;
    refused(&site, "u128", Tagged::Wide { cents: u128::MAX }).await;
    refused(&site, "renamed", Renamed { name: "x".to_owned() }).await;
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum Amount {
    Float(f64),
    Integer(i64),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Order {
    id: String,
    #[serde(skip)]
    token: String,
    amount: Amount,
    rate: Option<f64>,
    wide: u128,
}

async fn the_first_attempt_gets_what_a_later_one_gets<DB: Db>(site: Site<DB>) {
    let runs = Count::default();
    let handler = move |idempotency: Idempotency| {
        let run = runs.add();
        async move {
            let step = async |tx: &mut DB::Connection| {
                DB::run(tx, "INSERT INTO steps VALUES ('step')").await?;
                Ok::<_, TxError>(Order {
                    id: "ord_1".to_owned(),
                    token: "lost".to_owned(),
                    amount: Amount::Integer(5),
                    rate: Some(f64::NAN),
                    wide: u128::MAX,
                })
            };
            let result = idempotency.phase("step", step).await?;
            let status = if run == 1 { StatusCode::BAD_GATEWAY } else { StatusCode::CREATED };
            Ok::<_, TxError>((status, format!("{result:?}")))
        }
    };
    let node = site.node(handler);
    let (first, second) = (node.send().await, node.send_after_end().await);
    assert_eq!((first.status, second.status), (StatusCode::BAD_GATEWAY, StatusCode::CREATED));
    assert_eq!(first.body, second.body);
    assert!(!String::from_utf8_lossy(&first.body).contains("lost"), "{first:?}");
    assert_eq!(site.steps("step").await, 1);
}

async fn the_resource_of_a_call_is_the_same_in_every_attempt<DB: Db>(site: Site<DB>) {
    let runs = Count::default();
    let handler = move |idempotency: Idempotency| {
        let run = runs.add();
        async move {
            let mut made = Vec::new();
            for resource in [
                Resource::new(""),
                Resource::new("ch").with_payload(""),
                Resource::new("ch").with_payload(vec![0, 255, 10]),
                Resource::new("ch ü \u{1F600} '\"\\"),
            ] {
                let got = idempotency.intent("bank").call(async |_| Ok(resource)).await?;
                made.push(format!("{:?} {:?}", got.id, got.payload));
            }
            let status = if run == 1 { StatusCode::BAD_GATEWAY } else { StatusCode::CREATED };
            Ok::<_, TxError>((status, made.join(", ")))
        }
    };
    let node = site.node(handler);
    let (first, second) = (node.send().await, node.send_after_end().await);
    assert_eq!((first.status, second.status), (StatusCode::BAD_GATEWAY, StatusCode::CREATED));
    assert_eq!(first.body, second.body);
}
