//! `antiphon workers gone` and `antiphon relays gone`: a person knows what silence does not tell.

use std::{path::Path, process::ExitCode};

use antiphon_proto::v1::{
    FleetStatusRequest, FleetStatusResponse, RegionStatus, ReportRelayGoneRequest, ReportWorkerGoneRequest,
};
use anyhow::{Context as _, bail, ensure};
use serde_json::json;

use crate::present::out;
use crate::{
    args::{GoneArgs, RelaysCommand, WorkersCommand},
    fleet::{Context, RouterContext},
    keys::ask_all,
};

pub(crate) async fn worker(command: &WorkersCommand, dir: &Path, json: bool) -> anyhow::Result<ExitCode> {
    let WorkersCommand::Gone(args) = command;
    let context = Context::load(dir)?;
    let router = find(&context, "worker", args, |region| {
        region.workers.iter().find(|worker| worker.name == args.name).map(|worker| worker.connected)
    });
    let router = router.await?;
    let request = ReportWorkerGoneRequest { name: args.name.clone(), incarnation: 0 };
    let known = context.admin(router)?.report_worker_gone(request).await.map_err(refused)?.into_inner().known;
    said("worker", args, router, known, json)
}

pub(crate) async fn relay(command: &RelaysCommand, dir: &Path, json: bool) -> anyhow::Result<ExitCode> {
    let RelaysCommand::Gone(args) = command;
    let context = Context::load(dir)?;
    let router = find(&context, "relay", args, |region| {
        region.relays.iter().find(|relay| relay.name == args.name).map(|relay| relay.connected)
    });
    let router = router.await?;
    let request = ReportRelayGoneRequest { name: args.name.clone() };
    let known = context.admin(router)?.report_relay_gone(request).await.map_err(refused)?.into_inner().known;
    said("relay", args, router, known, json)
}

/// The router of the one region that has somebody of this name; `connected` says of a region whether it does, and
/// whether he is connected there.
async fn find<'a>(
    context: &'a Context,
    kind: &str,
    args: &GoneArgs,
    connected: impl Fn(&RegionStatus) -> Option<bool>,
) -> anyhow::Result<&'a RouterContext> {
    let (answers, failed) = ask_all(context, async |mut admin| admin.fleet_status(FleetStatusRequest {}).await).await;
    let wanted = |region: &str| args.region.as_ref().is_none_or(|wanted| wanted == region);
    let found = answers.iter().filter(|(region, _)| wanted(region)).filter_map(|(region, status)| {
        let FleetStatusResponse { regions, .. } = status;
        let local = regions.iter().find(|region| region.local)?;
        Some((region, connected(local)?))
    });
    let found: Vec<_> = found.collect();
    let silent = if failed.is_empty() { String::new() } else { format!(" ({failed})") };
    let (region, connected) = match found[..] {
        [one] => one,
        [] => bail!("no router knows a {kind} {:?}{silent}: `antiphon status` lists them", args.name),
        _ => {
            let regions: Vec<_> = found.iter().map(|(region, _)| region.as_str()).collect();
            bail!("{} have a {kind} {:?}: say which with --region", regions.join(" and "), args.name)
        }
    };
    ensure!(!connected, "{kind} {} of {region} is connected to its router: stop it first", args.name);
    context.routers.iter().find(|router| router.region == *region).context("the router has just answered")
}

fn said(kind: &str, args: &GoneArgs, router: &RouterContext, known: bool, json: bool) -> anyhow::Result<ExitCode> {
    let (name, region) = (&args.name, &router.region);
    ensure!(known, "the router of {region} no longer knows a {kind} {name:?}");
    if json {
        out!("{}", json!({"kind": kind, "name": name, "region": region, "gone": true}));
    } else {
        out!("{kind} {name} of {region} is gone");
    }
    Ok(ExitCode::SUCCESS)
}

fn refused(status: tonic::Status) -> anyhow::Error {
    anyhow::anyhow!("the router does not take it: {}", status.message())
}

#[cfg(test)]
mod tests {
    use antiphon_runtime::pki::FleetCa;

    use super::*;
    use crate::stand_in::{NOBODY, Told, context, with_router};

    fn args(name: &str, region: Option<&str>) -> GoneArgs {
        GoneArgs { name: name.into(), region: region.map(Into::into) }
    }

    #[tokio::test]
    async fn only_who_is_known_and_not_connected_can_be_gone() {
        let ca = FleetCa::from_seed(&[7; 32]).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let told = Told::default();
        with_router(&ca, told, async |address| {
            let context = context(&dir, &ca, &[address, NOBODY.to_owned()]);
            let of = async |name: &str, region: Option<&str>, connected: Option<bool>| {
                let args = args(name, region);
                let found = find(&context, "worker", &args, |_| connected).await;
                found.map(|router| router.region.clone()).map_err(|error| error.to_string())
            };
            assert_eq!(of("desk-0", None, Some(false)).await.unwrap(), "region-0");
            let alive = of("desk-0", Some("region-0"), Some(true)).await.unwrap_err();
            assert_eq!(alive, "worker desk-0 of region-0 is connected to its router: stop it first");
            let unknown = of("desk-9", None, None).await.unwrap_err();
            assert!(unknown.starts_with("no router knows a worker \"desk-9\" (region-1: "), "{unknown}");
            let elsewhere = of("desk-0", Some("region-1"), Some(false)).await.unwrap_err();
            assert!(elsewhere.starts_with("no router knows a worker"), "{elsewhere}");
        })
        .await;
    }
}
