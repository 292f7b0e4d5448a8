{{/* What the operator may do, as operator/src/rbac.rs has it; a test there compares. In the release's namespace: */}}
{{- define "antiphon.rulesHere" -}}
# Regions: routers and relays.
- apiGroups: [antiphon.dev]
  resources: [voiceregions]
  verbs: [get, list, watch, patch]
- apiGroups: [antiphon.dev]
  resources: [voiceregions/status]
  verbs: [patch]
- apiGroups: [antiphon.dev]
  resources: [voiceregions/finalizers]
  verbs: [update]
- apiGroups: [apps]
  resources: [deployments]
  verbs: [get, list, watch, create, patch]
- apiGroups: [""]
  resources: [services]
  verbs: [get, list, watch, create, patch, delete]
# Who of several operators leads.
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  verbs: [get, create, update]
{{- end }}

{{/* In every namespace that is served, the release's included. */}}
{{- define "antiphon.rulesServed" -}}
# Agents, their pools, and drains.
- apiGroups: [antiphon.dev]
  resources: [voiceagents, drains]
  verbs: [get, list, watch, patch]
- apiGroups: [antiphon.dev]
  resources: [workerpools]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [antiphon.dev]
  resources: [voiceagents/status, workerpools/status, drains/status]
  verbs: [patch]
- apiGroups: [antiphon.dev]
  resources: [voiceagents/finalizers, workerpools/finalizers]
  verbs: [update]
# Workers.
- apiGroups: [apps]
  resources: [replicasets]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch, patch, delete]
# What they run with: identities among the Secrets. Kubernetes cannot limit this to Secrets of the operator's own.
- apiGroups: [""]
  resources: [serviceaccounts, secrets]
  verbs: [get, list, watch, create, patch]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, list, watch, create, patch]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, list, watch, create, patch]
{{- if .Values.certificates.issuerKind }}
- apiGroups: [cert-manager.io]
  resources: [certificates]
  verbs: [get, list, watch, create, patch]
{{- end }}
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create, patch]
{{- end }}

{{/* Without a namespace. */}}
{{- define "antiphon.rulesCluster" -}}
# Drains of nodes: which are there, and which are being emptied.
- apiGroups: [""]
  resources: [nodes]
  verbs: [get, list, watch]
{{- end }}
