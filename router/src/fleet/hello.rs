//! Who wants to register, checked.

use antiphon_core::id::{Incarnation, RelayNumber, ShardNumber, WorkerNumber};
use antiphon_proto::v1;
use antiphon_runtime::pki::PeerName;

use crate::field::{self, FieldError};

/// A worker that wants to register.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct WorkerHello {
    pub(crate) name: String,
    /// The name in its certificate, which others made from the same template share.
    pub(crate) server_name: String,
    pub(crate) agent: String,
    pub(crate) gpu_class: String,
    pub(crate) slots: u32,
    pub(crate) incarnation: Incarnation,
    pub(crate) held: Option<WorkerNumber>,
    /// Where relays send each shard's frames.
    pub(crate) shards: Vec<(ShardNumber, String)>,
    pub(crate) control_address: String,
}

impl WorkerHello {
    /// Whether the worker's certificate is for this agent: whoever can read one pool's certificate must not get the
    /// callers of another agent.
    pub(crate) fn check_agent(&self, certified: &[String]) -> Result<(), FieldError> {
        if certified.contains(&self.agent) {
            return Ok(());
        }
        let of = match certified {
            [] => "names no agent: issue one that does".to_owned(),
            agents => format!("is for {}", agents.join(", ")),
        };
        Err(FieldError::new("agent", format!("{:?}, but the worker's certificate {of}", self.agent)))
    }

    /// Checks what a worker says of itself against its certificate and the ranges.
    pub(crate) fn check(hello: &v1::WorkerHello, peer: &PeerName) -> Result<Self, FieldError> {
        own_name(&hello.name, &hello.region, peer)?;
        if hello.gpu_class.len() > MAX_GPU_CLASS {
            let problem = format!("has {} characters, at most {MAX_GPU_CLASS}", hello.gpu_class.len());
            return Err(FieldError::new("gpuClass", problem));
        }
        if hello.shards.len() > MAX_SHARDS {
            let problem = format!("has {} shards, at most {MAX_SHARDS}", hello.shards.len());
            return Err(FieldError::new("shards", problem));
        }
        if !(1..=MAX_SLOTS).contains(&hello.slots) {
            let problem = format!("{} is out of range 1..={MAX_SLOTS}", hello.slots);
            return Err(FieldError::new("slots", problem));
        }
        let held = hello.worker_number.map(|number| {
            let number = u16::try_from(number).ok();
            let number = number.and_then(|n| WorkerNumber::new(n).ok());
            number.ok_or_else(|| FieldError::new("workerNumber", "is out of range 0..=65535"))
        });
        let mut shards = Vec::with_capacity(hello.shards.len());
        for (index, shard) in hello.shards.iter().enumerate() {
            let at = format!("shards[{index}]");
            let number = u8::try_from(shard.number).ok();
            let number = number.and_then(|n| ShardNumber::new(n).ok());
            let number = number.filter(|n| shards.iter().all(|(other, _)| other != n));
            let number =
                number.ok_or_else(|| FieldError::new(format!("{at}.number"), "is not in 0..=63 or there twice"))?;
            let address = field::socket_address("tunnelAddress", &shard.tunnel_address);
            shards.push((number, address.map_err(|e| e.below(&at))?));
        }
        if shards.is_empty() {
            return Err(FieldError::new("shards", "a worker has at least one"));
        }
        let incarnation = Incarnation::new(hello.incarnation);
        Ok(Self {
            name: hello.name.clone(),
            server_name: peer.dns(),
            agent: field::agent("agent", &hello.agent)?,
            gpu_class: hello.gpu_class.clone(),
            slots: hello.slots,
            incarnation: incarnation.map_err(|e| FieldError::new("incarnation", e.to_string()))?,
            held: held.transpose()?,
            shards,
            control_address: field::socket_address("controlAddress", &hello.control_address)?,
        })
    }
}

/// A relay that wants to register.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct RelayHello {
    pub(crate) name: String,
    pub(crate) public_address: String,
    pub(crate) more_public_addresses: Vec<String>,
    pub(crate) tunnel_address: String,
    /// Its index in the region, if it holds a number of this region.
    pub(crate) held: Option<u8>,
}

impl RelayHello {
    /// Checks what a relay says of itself against its certificate and the ranges.
    pub(crate) fn check(hello: &v1::RelayHello, peer: &PeerName) -> Result<Self, FieldError> {
        own_name(&hello.name, &hello.region, peer)?;
        let number = hello.relay_number.and_then(|n| u16::try_from(n).ok());
        let number = number.and_then(|n| RelayNumber::new(n).ok());
        Ok(Self {
            name: hello.name.clone(),
            public_address: field::socket_address("publicAddress", &hello.public_address)?,
            more_public_addresses: more_addresses(&hello.more_public_addresses)?,
            tunnel_address: field::socket_address("tunnelAddress", &hello.tunnel_address)?,
            held: number.map(RelayNumber::index),
        })
    }
}

fn more_addresses(more: &[String]) -> Result<Vec<String>, FieldError> {
    if more.len() > MORE_ADDRESSES {
        let problem = format!("has {} addresses, at most {MORE_ADDRESSES}", more.len());
        return Err(FieldError::new("morePublicAddresses", problem));
    }
    let check =
        |(index, address): (usize, &String)| field::socket_address(&format!("morePublicAddresses[{index}]"), address);
    more.iter().enumerate().map(check).collect()
}

/// Besides the first: every ticket carries all of them.
const MORE_ADDRESSES: usize = 3;

/// A process may register under a name that its certificate covers only.
fn own_name(name: &str, region: &str, peer: &PeerName) -> Result<(), FieldError> {
    field::label("name", name)?;
    let table =
        [("name", name, &peer.name, peer.covers(name)), ("region", region, &peer.region, region == peer.region)];
    for (path, said, certified, fits) in table {
        if !fits {
            let said: String = said.chars().take(80).collect();
            let problem = format!("{said:?}, but the certificate says {certified:?}");
            return Err(FieldError::new(path, problem));
        }
    }
    Ok(())
}

/// Far above what one machine serves.
const MAX_SLOTS: u32 = 100_000;
/// As many as a server ID can tell apart.
const MAX_SHARDS: usize = 64;
/// As long as a label's value in Kubernetes.
const MAX_GPU_CLASS: usize = 63;

#[cfg(test)]
mod tests {
    use super::*;
    use antiphon_runtime::pki::Role;

    fn hello() -> v1::WorkerHello {
        v1::WorkerHello {
            name: "w-1".into(),
            region: "frankfurt".into(),
            agent: "shop/desk".into(),
            slots: 10,
            shards: vec![v1::Shard { number: 0, tunnel_address: "127.0.0.1:4000".into() }],
            control_address: "127.0.0.1:4001".into(),
            ..v1::WorkerHello::default()
        }
    }

    #[test]
    fn a_worker_is_what_its_certificate_says() {
        let peer = PeerName::new("w-1", Role::Worker, "frankfurt").unwrap();
        assert!(WorkerHello::check(&hello(), &peer).is_ok());
        type Change = fn(&mut v1::WorkerHello);
        let table: [(&str, Change); 13] = [
            ("name", |h| h.name = "w-2".into()),
            ("name", |h| h.name = "w-12".into()),
            ("name", |h| h.name = format!("w-1-{}", "x".repeat(60))),
            ("region", |h| h.region = "virginia".into()),
            ("agent", |h| h.agent = "desk".into()),
            ("slots", |h| h.slots = 0),
            ("workerNumber", |h| h.worker_number = Some(65_536)),
            ("shards", |h| h.shards.clear()),
            ("shards", |h| h.shards = vec![h.shards[0].clone(); 65]),
            ("gpuClass", |h| h.gpu_class = "x".repeat(64)),
            ("shards[0].number", |h| h.shards[0].number = 64),
            ("shards[1].number", |h| h.shards.push(h.shards[0].clone())),
            ("controlAddress", |h| h.control_address = "x".into()),
        ];
        for (path, change) in table {
            let mut bad = hello();
            change(&mut bad);
            assert_eq!(WorkerHello::check(&bad, &peer).unwrap_err().path, path);
        }
        let sibling = v1::WorkerHello { name: "w-1-55d9f-x7x2k".into(), ..hello() };
        let sibling = WorkerHello::check(&sibling, &peer).unwrap();
        assert_eq!(sibling.server_name, "w-1.worker.frankfurt.antiphon.internal");
    }

    #[test]
    fn a_worker_serves_the_agent_of_its_certificate() {
        let peer = PeerName::new("w-1", Role::Worker, "frankfurt").unwrap();
        let worker = WorkerHello::check(&hello(), &peer).unwrap();
        let refused = |certified: &[&str]| {
            let certified: Vec<_> = certified.iter().map(ToString::to_string).collect();
            worker.check_agent(&certified).err().map(|e| e.to_string())
        };
        assert_eq!(refused(&["shop/desk"]), None);
        assert_eq!(refused(&["bank/desk", "shop/desk"]), None);
        let of_another = r#"agent: "shop/desk", but the worker's certificate is for bank/desk"#;
        assert_eq!(refused(&["bank/desk"]).as_deref(), Some(of_another));
        assert!(refused(&[]).unwrap().ends_with("names no agent: issue one that does"));
    }
}
