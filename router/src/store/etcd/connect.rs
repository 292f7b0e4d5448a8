//! How etcd is reached: addresses, TLS, user.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    time::Duration,
};

use antiphon_runtime::{cause, private_file::read_secret};
use anyhow::{Context as _, anyhow, bail, ensure};
use etcd_client::{Certificate, Client, ConnectOptions, Identity, TlsOptions};
use tokio::time::timeout;
use tonic::transport::Endpoint;

use crate::args::StoreArgs;

/// Where etcd is and how to log in there. Files are read again for each connection, so that renewed ones are used.
#[derive(Clone)]
pub struct EtcdConfig {
    endpoints: Vec<String>,
    pub(super) prefix: String,
    ca: Option<PathBuf>,
    pair: Option<(PathBuf, PathBuf)>,
    user: Option<(String, PathBuf)>,
}

impl fmt::Debug for EtcdConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdConfig").field("endpoints", &self.endpoints).field("prefix", &self.prefix).finish()
    }
}

impl EtcdConfig {
    /// From the command line; checks that all files can be used. `None`: no etcd is named.
    ///
    /// # Errors
    /// Options that do not fit together, or a file that cannot be used.
    pub fn new(args: &StoreArgs, region: &str) -> anyhow::Result<Option<Self>> {
        let Some(first) = args.etcd.first() else {
            let alone = [&args.etcd_ca, &args.etcd_cert, &args.etcd_key, &args.etcd_password_file];
            let alone =
                alone.iter().any(|file| file.is_some()) || args.etcd_user.is_some() || args.etcd_prefix.is_some();
            ensure!(!alone, "options for etcd are given, but no --etcd URL");
            return Ok(None);
        };
        let tls = first.starts_with("https://");
        for url in &args.etcd {
            let scheme = if tls { "https://" } else { "http://" };
            let rest = url.strip_prefix(scheme);
            ensure!(
                rest.is_some_and(|rest| !rest.is_empty()),
                "--etcd {url}: expected http://HOST:PORT or https://HOST:PORT, the same for all"
            );
        }
        ensure!(
            tls || args.etcd_ca.is_none() && args.etcd_cert.is_none(),
            "--etcd-ca and --etcd-cert need https:// URLs"
        );
        ensure!(!tls || args.etcd_ca.is_some(), "https:// needs --etcd-ca, the certificate that etcd's is signed with");
        let pair = match (&args.etcd_cert, &args.etcd_key) {
            (Some(cert), Some(key)) => Some((cert.clone(), key.clone())),
            (None, None) => None,
            _ => bail!("--etcd-cert and --etcd-key belong together"),
        };
        let user = match (&args.etcd_user, &args.etcd_password_file) {
            (Some(user), Some(file)) => Some((user.clone(), file.clone())),
            (None, None) => None,
            _ => bail!("--etcd-user and --etcd-password-file belong together"),
        };
        let prefix = args.etcd_prefix.clone().unwrap_or_else(|| format!("/antiphon/{region}"));
        let legal = prefix.starts_with('/') && prefix.len() > 1 && !prefix.ends_with('/');
        ensure!(legal, "--etcd-prefix {prefix}: expected a path such as /antiphon/{region}");
        let config = Self { endpoints: args.etcd.clone(), prefix, ca: args.etcd_ca.clone(), pair, user };
        config.options()?;
        Ok(Some(config))
    }

    fn tls(&self) -> anyhow::Result<Option<TlsOptions>> {
        let Some(ca) = &self.ca else {
            return Ok(None);
        };
        let mut tls = TlsOptions::new().ca_certificate(Certificate::from_pem(read(ca, "--etcd-ca")?));
        if let Some((cert, key)) = &self.pair {
            let (cert, key) = (read(cert, "--etcd-cert")?, read(key, "--etcd-key")?);
            tls = tls.identity(Identity::from_pem(cert, key));
        }
        Ok(Some(tls))
    }

    fn options(&self) -> anyhow::Result<ConnectOptions> {
        // A connection that says nothing, not even to a ping, is given up; so is a member without a leader.
        let mut options = ConnectOptions::new()
            .with_connect_timeout(CONNECT)
            .with_keep_alive(PING, PONG)
            .with_keep_alive_while_idle(true)
            .with_require_leader(true);
        if let Some(tls) = self.tls()? {
            options = options.with_tls(tls);
        }
        if let Some((user, file)) = &self.user {
            options = options.with_user(user, password(file)?);
        }
        Ok(options)
    }

    /// Whether any member can be reached. The client tries again and again without saying what is wrong.
    async fn knock(&self) -> anyhow::Result<()> {
        let mut problem = None;
        for url in &self.endpoints {
            let mut endpoint = Endpoint::from_shared(url.clone())?.connect_timeout(CONNECT);
            if let Some(tls) = self.tls()? {
                endpoint = endpoint.tls_config(tls)?;
            }
            match endpoint.connect().await {
                Ok(_) => return Ok(()),
                Err(error) => problem = Some(anyhow::Error::new(error).context(url.clone())),
            }
        }
        problem.map_or(Ok(()), Err)
    }

    /// Connects and logs in.
    pub(super) async fn connect(&self) -> anyhow::Result<Client> {
        let options = self.options()?;
        self.knock().await?;
        let client = timeout(LOGIN, Client::connect(&self.endpoints, Some(options))).await;
        let client = client.with_context(|| format!("no answer within {} s", LOGIN.as_secs()))?;
        client.map_err(|error| anyhow!("connecting: {}", told(&error)))
    }

    /// For people.
    pub(super) fn shown(&self) -> String {
        format!("{}{}", self.endpoints.join(","), self.prefix)
    }
}

/// What etcd or the way to it says, for people.
pub(super) fn told(error: &etcd_client::Error) -> String {
    match error {
        etcd_client::Error::GRpcStatus(status) => cause::text(status),
        etcd_client::Error::TransportError(error) => cause::text(error),
        other => other.to_string(),
    }
}

fn read(path: &Path, option: &str) -> anyhow::Result<String> {
    fs::read_to_string(path).with_context(|| format!("{option} {}", path.display()))
}

fn password(path: &Path) -> anyhow::Result<String> {
    let shown = path.display();
    let text = read_secret(path).context("--etcd-password-file")?;
    let text = text.strip_suffix('\n').unwrap_or(&text);
    ensure!(!text.is_empty(), "--etcd-password-file {shown} is empty");
    Ok(text.to_owned())
}

const CONNECT: Duration = Duration::from_secs(2);
const LOGIN: Duration = Duration::from_secs(4);
const PING: Duration = Duration::from_secs(3);
const PONG: Duration = Duration::from_secs(3);

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use clap::Parser as _;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        store: StoreArgs,
    }

    fn config(options: &[&str]) -> anyhow::Result<Option<EtcdConfig>> {
        let line = Line::try_parse_from([&["router"], options].concat())?;
        EtcdConfig::new(&line.store, "north")
    }

    #[test]
    fn what_does_not_fit_together_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let open = dir.path().join("password");
        fs::write(&open, "secret\n").unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o644)).unwrap();
        let open = open.to_str().unwrap();
        let table: [(&[&str], &str); 9] = [
            (&["--etcd-user", "u"], "no --etcd URL"),
            (&["--etcd", "127.0.0.1:2379"], "expected http://HOST:PORT"),
            (&["--etcd", "http://a:1", "--etcd", "https://b:1"], "the same for all"),
            (&["--etcd", "https://a:1"], "needs --etcd-ca"),
            (&["--etcd", "http://a:1", "--etcd-ca", "ca.pem"], "need https://"),
            (&["--etcd", "https://a:1", "--etcd-ca", "/none", "--etcd-cert", "c"], "belong together"),
            (&["--etcd", "https://a:1", "--etcd-ca", "/none"], "--etcd-ca /none"),
            (&["--etcd", "http://a:1", "--etcd-user", "u", "--etcd-password-file", open], "chmod 600"),
            (&["--etcd", "http://a:1", "--etcd-prefix", "/x/"], "expected a path"),
        ];
        for (options, expected) in table {
            let error = format!("{:#}", config(options).unwrap_err());
            assert!(error.contains(expected), "{options:?}: {error}");
        }
        assert!(config(&[]).unwrap().is_none());
        assert_eq!(config(&["--etcd", "http://a:1"]).unwrap().unwrap().prefix, "/antiphon/north");
    }
}
