//! Objects that belong to another one: applied when they differ, and never taken from somebody else.

use kube::{Api, Resource, ResourceExt, core::PartialObjectMeta};

use crate::{
    Context, Error,
    apply::{Applied, Owned},
    cache::Cache,
    labels::{FIELD_MANAGER, MANAGED_BY},
};

impl Context {
    /// Makes an owned object what it should be and says so in its owner's events where something had to be done.
    ///
    /// # Errors
    /// Somebody else's object has its name, or the API server refuses or cannot be reached.
    pub async fn ensure<O, K>(&self, owner: &O, desired: &K, cache: &Cache<K>) -> Result<Applied, Error>
    where
        O: Resource<DynamicType = ()>,
        K: Owned,
    {
        let (namespace, name) = (desired.namespace().unwrap_or_default(), desired.name_any());
        let live = cache.find(&namespace, &name);
        if live.is_none() {
            self.check_free(owner, desired).await?;
        }
        let applied = self.applier.apply(desired, live.as_deref()).await?;
        let kind = K::kind(&());
        match applied {
            Applied::Unchanged => {}
            Applied::Created => {
                self.events.about(owner, desired, "Created", "Apply", format!("{kind} {name} was made")).await;
            }
            Applied::Changed => {
                self.events.about(owner, desired, "Updated", "Apply", format!("{kind} {name} was changed")).await;
            }
            Applied::Corrected => {
                let note = format!(
                    "{kind} {name} had been changed by somebody else and was put right: change its {} instead",
                    O::kind(&())
                );
                self.events.about(owner, desired, "Corrected", "Apply", note).await;
            }
        }
        Ok(applied)
    }

    /// Deletes an owned object that is no longer wanted; whether there was one.
    ///
    /// # Errors
    /// The API server refuses or cannot be reached.
    pub async fn remove<O, K>(&self, owner: &O, name: &str, cache: &Cache<K>) -> Result<bool, Error>
    where
        O: Resource<DynamicType = ()>,
        K: Owned,
    {
        let namespace = owner.meta().namespace.clone().unwrap_or_default();
        let Some(live) = cache.find(&namespace, name) else {
            return Ok(false);
        };
        if live.meta().deletion_timestamp.is_some() || !belongs_to(live.meta(), owner.meta()) {
            return Ok(false);
        }
        let deleted = self.applier.delete(live.as_ref()).await?;
        if deleted {
            let note = format!("{} {name} is not needed any more and was deleted", K::kind(&()));
            self.events.about(owner, live.as_ref(), "Deleted", "Delete", note).await;
        }
        Ok(deleted)
    }

    /// An object that the cache does not have may be there all the same: another one's, or one that lost its label.
    async fn check_free<O, K>(&self, owner: &O, desired: &K) -> Result<(), Error>
    where
        O: Resource<DynamicType = ()>,
        K: Owned,
    {
        let (namespace, name) = (desired.namespace().unwrap_or_default(), desired.name_any());
        let api: Api<K> = Api::namespaced(self.client.clone(), &namespace);
        let found: Option<PartialObjectMeta<K>> = api.get_metadata_opt(&name).await?;
        let ours = |found: &PartialObjectMeta<K>| {
            belongs_to(&found.metadata, owner.meta())
                || found.labels().get(MANAGED_BY).map(String::as_str) == Some(FIELD_MANAGER)
        };
        match found {
            Some(found) if !ours(&found) => Err(Error::Spec(format!(
                "{} {namespace}/{name} is there and not Antiphon's: delete or rename it",
                K::kind(&())
            ))),
            _ => Ok(()),
        }
    }
}

/// Whether one object is the controller of another.
#[must_use]
pub fn belongs_to(
    object: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta,
    owner: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta,
) -> bool {
    let owners = object.owner_references.iter().flatten();
    owner.uid.is_some()
        && owners.filter(|found| found.controller == Some(true)).any(|found| Some(&found.uid) == owner.uid.as_ref())
}
