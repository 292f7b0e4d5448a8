//! TLS in both directions, users with as few rights as the documentation says.

use std::{fs, net::IpAddr, path::PathBuf, time::SystemTime};

use antiphon_router::{Store as _, StoreArgs};
use antiphon_runtime::pki::{FleetCa, PeerName, Role, write_secret};
use etcd_client::{Certificate, Client, ConnectOptions, Identity, Permission, PermissionType, TlsOptions};

use super::{
    server::Server,
    stores::{Open, agent, knows},
};
use crate::world::eventually;

/// Certificates of one authority, as files.
struct Authority {
    ca: FleetCa,
    dir: tempfile::TempDir,
}

impl Authority {
    fn new(seed: u8) -> Self {
        Self { ca: FleetCa::from_seed(&[seed; 32]).unwrap(), dir: tempfile::tempdir().unwrap() }
    }

    /// The directory with cert.pem, key.pem and ca.pem.
    fn issue(&self, name: &str) -> PathBuf {
        let address = [IpAddr::from([127, 0, 0, 1])];
        let peer = PeerName::new(name, Role::Router, "north").unwrap();
        let dir = self.dir.path().join(name);
        fs::create_dir(&dir).unwrap();
        self.ca.issue(&peer, &address, SystemTime::now()).unwrap().save(&dir).unwrap();
        dir
    }
}

fn text(path: PathBuf) -> String {
    path.into_os_string().into_string().unwrap()
}

#[tokio::test]
async fn etcd_is_reached_over_tls_as_a_user_who_may_do_nothing_else() {
    let authority = Authority::new(1);
    let (server_pair, client_pair) = (authority.issue("etcd"), authority.issue("client"));
    let options = [
        format!("--cert-file={}", text(server_pair.join("cert.pem"))),
        format!("--key-file={}", text(server_pair.join("key.pem"))),
        format!("--trusted-ca-file={}", text(server_pair.join("ca.pem"))),
        "--client-cert-auth".to_owned(),
    ];
    let pem = |name: &str| fs::read_to_string(client_pair.join(name)).unwrap();
    let tls = TlsOptions::new()
        .ca_certificate(Certificate::from_pem(pem("ca.pem")))
        .identity(Identity::from_pem(pem("cert.pem"), pem("key.pem")));
    let login = ConnectOptions::new().with_tls(tls);
    let server = Server::with("https", &options, Some(login.clone())).await;
    let mut root = Client::connect([server.url()], Some(login)).await.unwrap();
    for (user, password) in [("root", "over all"), ("antiphon", "hush")] {
        root.user_add(user, password, None).await.unwrap();
        root.role_add(user).await.unwrap();
        root.user_grant_role(user, user).await.unwrap();
    }
    let below = Permission::new(PermissionType::Readwrite, "/antiphon/north/").with_prefix();
    root.role_grant_permission("antiphon", below).await.unwrap();
    root.auth_enable().await.unwrap();

    let password = authority.dir.path().join("password");
    write_secret(&password, b"hush\n").unwrap();
    let args = StoreArgs {
        etcd_ca: Some(client_pair.join("ca.pem")),
        etcd_cert: Some(client_pair.join("cert.pem")),
        etcd_key: Some(client_pair.join("key.pem")),
        etcd_user: Some("antiphon".into()),
        etcd_password_file: Some(password.clone()),
        ..server.args(server.address)
    };
    let open = Open::ready(&args).await;
    open.store.apply(&agent("known")).await.unwrap();
    assert!(knows(&*open.store, "known"));

    let refused = async |args: &StoreArgs, expected: &str| {
        let open = Open::new(args, None);
        let mut said = std::collections::BTreeSet::new();
        let mut is_said = async || {
            let error = open.store.apply(&agent("new")).await.unwrap_err().to_string();
            let found = error.contains(expected);
            said.insert(error);
            found
        };
        let waited = tokio::time::timeout(std::time::Duration::from_secs(10), eventually(expected, &mut is_said)).await;
        assert!(waited.is_ok(), "{said:?}");
    };
    let elsewhere = StoreArgs { etcd_prefix: Some("/antiphon/south".into()), ..args.clone() };
    refused(&elsewhere, "permission denied").await;
    let anonymous = StoreArgs { etcd_cert: None, etcd_key: None, ..args.clone() };
    refused(&anonymous, "transport error").await;
    let stranger = Authority::new(2);
    let other = Some(stranger.issue("client").join("ca.pem"));
    refused(&StoreArgs { etcd_ca: other, ..args.clone() }, "invalid peer certificate").await;

    // A password that is put right is used without a restart.
    fs::write(&password, "wrong").unwrap();
    let waiting = Open::new(&args, None);
    eventually("it is refused", async || {
        let error = waiting.store.apply(&agent("new")).await.unwrap_err().to_string();
        error.contains("invalid user ID or password")
    })
    .await;
    fs::write(&password, "hush").unwrap();
    waiting.reached().await;
    eventually("it is known", async || knows(&*waiting.store, "known")).await;
}
