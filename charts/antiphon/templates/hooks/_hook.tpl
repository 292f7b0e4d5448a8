{{/*
A job of the operator's image with rights of its own, gone when it is done.
{root, name, events, arguments, rules (in the release's namespace), everywhere (in all namespaces that are served, and
without one)}.
*/}}
{{- define "antiphon.hook" -}}
{{- $root := .root }}
{{- $name := printf "%s-%s" (include "antiphon.fullname" $root) .name }}
{{- $clusterName := include "antiphon.clusterName" (dict "root" $root "name" .name) }}
{{- $labels := include "antiphon.labels" (dict "root" $root "component" .name) }}
{{- $subjects := printf "- {kind: ServiceAccount, name: %s, namespace: %s}" $name $root.Release.Namespace }}
{{- $before := dict "events" .events "weight" "-10" }}
---
apiVersion: v1
kind: ServiceAccount
metadata:
  name: {{ $name }}
  namespace: {{ $root.Release.Namespace }}
  labels:
    {{- $labels | nindent 4 }}
  annotations:
    {{- include "antiphon.hookAnnotations" $before | nindent 4 }}
{{- range $namespace, $rules := .roles }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata:
  name: {{ $name }}
  namespace: {{ $namespace }}
  labels:
    {{- $labels | nindent 4 }}
  annotations:
    {{- include "antiphon.hookAnnotations" $before | nindent 4 }}
rules:
  {{- $rules | trim | nindent 2 }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  name: {{ $name }}
  namespace: {{ $namespace }}
  labels:
    {{- $labels | nindent 4 }}
  annotations:
    {{- include "antiphon.hookAnnotations" $before | nindent 4 }}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: {{ $name }}}
subjects:
  {{- $subjects | nindent 2 }}
{{- end }}
{{- with .clusterRole }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: {{ $clusterName }}
  labels:
    {{- $labels | nindent 4 }}
  annotations:
    {{- include "antiphon.hookAnnotations" $before | nindent 4 }}
rules:
  {{- . | trim | nindent 2 }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata:
  name: {{ $clusterName }}
  labels:
    {{- $labels | nindent 4 }}
  annotations:
    {{- include "antiphon.hookAnnotations" $before | nindent 4 }}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: {{ $clusterName | quote }}}
subjects:
  {{- $subjects | nindent 2 }}
{{- end }}
---
apiVersion: batch/v1
kind: Job
metadata:
  name: {{ $name }}
  namespace: {{ $root.Release.Namespace }}
  labels:
    {{- $labels | nindent 4 }}
  annotations:
    {{- include "antiphon.hookAnnotations" (dict "events" .events "weight" (.weight | default "0")) | nindent 4 }}
spec:
  backoffLimit: 3
  template:
    metadata:
      labels:
        {{- $labels | nindent 8 }}
    spec:
      restartPolicy: Never
      serviceAccountName: {{ $name }}
      enableServiceLinks: false
      securityContext:
        {{- include "antiphon.podSecurity" $root | nindent 8 }}
      {{- with include "antiphon.pullSecrets" $root }}
      {{- . | nindent 6 }}
      {{- end }}
      {{- with $root.Values.operator.nodeSelector }}
      nodeSelector:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $root.Values.operator.tolerations }}
      tolerations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      containers:
        - name: {{ .name }}
          image: {{ include "antiphon.image" (dict "root" $root "name" "operator") }}
          imagePullPolicy: {{ $root.Values.images.pullPolicy }}
          command: [/antiphon-operator]
          args:
            {{- range .arguments }}
            - {{ . | quote }}
            {{- end }}
          env:
            - {name: ANTIPHON_LOG, value: {{ $root.Values.operator.log | quote }}}
          resources:
            requests: {cpu: 10m, memory: 32Mi}
            limits: {memory: 128Mi}
          securityContext:
            {{- include "antiphon.containerSecurity" $root | nindent 12 }}
{{- end }}

{{/* {events, weight}. */}}
{{- define "antiphon.hookAnnotations" -}}
helm.sh/hook: {{ .events }}
helm.sh/hook-weight: {{ .weight | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end }}
